/* Lines of text, and numbers for a picture, made of the runs of a map without a call of Python for each run. */
#ifndef TAPFS_MAP_RUNS_H
#define TAPFS_MAP_RUNS_H

#include "engine/engine.h"

/* cffi: begin */

/* The words of the lines of all runs that have these four in common. */
typedef struct {
    uint32_t layer;
    uint32_t file;
    uint8_t kind;
    uint8_t placed;
    uint8_t hidden; /* they have no line */
    uint8_t reserved[5];
    const char *words;
    const char *place; /* in a table, where they have no host offset */
} tapfs_line_shape;

/* All runs that have these four in common are counted in one column. */
typedef struct {
    uint32_t layer;
    uint32_t file;
    uint8_t kind;
    uint8_t placed;
    uint8_t data;
    uint8_t plotted; /* they lie in the file that is plotted */
    uint32_t column; /* below `columns` */
} tapfs_bin_shape;

/* A map as numbers. The arrays are the caller's, zeros at first. */
typedef struct {
    uint64_t start; /* of the first bin */
    uint64_t width; /* bytes of a bin, not 0 */
    uint64_t count;
    uint64_t columns;
    uint64_t *bytes; /* `count` times `columns`: bytes of the bin in this column */
    uint64_t *runs;  /* `columns`: runs in this column */
    uint64_t *plot;  /* `plot_down` times `plot_across`: bytes of this piece of the disk in this piece of the file */
    uint64_t plot_across;
    uint64_t plot_down;
    uint64_t plot_x; /* bytes of the disk in a cell, not 0 */
    uint64_t plot_y; /* bytes of the file in a cell, not 0 */
    const uint64_t *places; /* offsets in the plotted file, ascending */
    uint64_t *found;        /* for each of them where it is on the disk, unless it is nowhere */
    uint64_t place_count;
    uint64_t fragments[64]; /* pieces of files that are read on without a jump, by the power of two below their length */
    uint64_t fragment_length;
    uint64_t fragment_end;
    uint64_t fragment_shape;
} tapfs_map_bins;

/*
 * Runs as text: a row each of offset, length, place and words, or (`json`) an object each behind a comma, whose keys are
 * start, length, those of the words, and offset if it has a place. It ends early at a run that fits no shape, and
 * where there is no more room. The number of runs that are done, `used` bytes of text.
 */
size_t tapfs_map_lines(const tapfs_mapped *runs, size_t count, const tapfs_line_shape *shapes, size_t shape_count,
                       int json, char *text, size_t capacity, size_t *used);
/* Count runs, which ascend. It ends early at a run that fits no shape. The number of runs that are done. */
size_t tapfs_map_count(tapfs_map_bins *into, const tapfs_mapped *runs, size_t count, const tapfs_bin_shape *shapes,
                       size_t shape_count);
/* There are no more runs. */
void tapfs_map_count_end(tapfs_map_bins *into);

/* cffi: end */

#endif
