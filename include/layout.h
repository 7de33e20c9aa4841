/* How data that kernels and Python code share is laid out in memory: packed codes, rows of int8
 * activations, and the cache of keys. simd.h describes a tile. */
#ifndef LEGACY1BIT_LAYOUT_H
#define LEGACY1BIT_LAYOUT_H

enum {
    /* Packed codes: strips of STRIP_ROWS rows, each a sequence of tiles of TILE_CODES columns, or of
     * TILE_TRITS columns in base 3. A tile has TILE_ROW_BYTES bytes for each row. */
    STRIP_ROWS = 32,
    TILE_ROW_BYTES = 4,
    TILE_BYTES = STRIP_ROWS * TILE_ROW_BYTES,
    CODES_PER_BYTE = 4,
    TRITS_PER_BYTE = 5,
    TILE_CODES = CODES_PER_BYTE * TILE_ROW_BYTES,
    TILE_TRITS = TRITS_PER_BYTE * TILE_ROW_BYTES,

    /* int8 activations: kernels read blocks of that many rows and columns, and tiles of columns. */
    ACTIVATION_ROWS = 32,
    ACTIVATION_COLUMNS = 64,

    /* The cache: keys in tiles of KEY_TILE, shared by up to CACHED_QUERIES queries at a time. */
    KEY_TILE = 16,
    CACHED_QUERIES = 4
};

#endif
