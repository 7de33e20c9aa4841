/* A team: threads that run one task side by side and wait for each other in it; see threads.h. */
#ifndef LEGACY1BIT_TEAM_H
#define LEGACY1BIT_TEAM_H

typedef struct {
    int size;
    int arrived;
    char padding[64];          /* those who wait look at a line that those who come leave alone */
    unsigned int generation;
} thread_team;

#endif
