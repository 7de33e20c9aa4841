/* A team: threads that run one parallel region and synchronize at barriers; see threads.h. */
#ifndef LEGACY1BIT_TEAM_H
#define LEGACY1BIT_TEAM_H

typedef struct {
    int size;
    int arrived;
    char padding[64];           /* waiting threads poll another cache line than `arrived` */
    unsigned int generation;
} thread_team;

#endif
