/*
 * Windows of a disk that threads read and search for zeros, while their owner writes those before. The owner is one
 * thread; it works, too, whenever it would otherwise wait for work that nobody has begun.
 */
#ifndef TAPFS_COPYING_H
#define TAPFS_COPYING_H

#include "engine/engine.h"

/* cffi: begin */

/*
 * Ranges that are read into `buffer`, one behind the other, and what of them is data (`tapfs_find_segments`, without
 * `below`). `outcome` says how the read ended; only after DONE there are `segment_count` segments.
 */
typedef struct {
    const tapfs_range *ranges;
    uint64_t range_count;
    void *buffer;
    uint64_t granule;
    tapfs_segment *segments;
    uint64_t segment_count;
    tapfs_outcome outcome;
} tapfs_window;

typedef struct tapfs_window_reader tapfs_window_reader;

/* At most `capacity` windows at a time, read by at most `threads` threads besides the owner. NULL: no memory. Fewer
 * threads, even none, are no error: the owner does what they do not. */
tapfs_window_reader *tapfs_window_reader_new(tapfs_disk *disk, uint32_t threads, uint32_t capacity);
/* Ends the threads; windows that are being read are waited for, others are left as they are. */
void tapfs_window_reader_free(tapfs_window_reader *reader);
/* Have a window read, behind the others. It stays the reader's until it is taken. 0, or ENOSPC for one too many. */
int tapfs_window_reader_add(tapfs_window_reader *reader, tapfs_window *window);
/* The window that was added first, once it is read; NULL: there is none. */
tapfs_window *tapfs_window_reader_take(tapfs_window_reader *reader);

/* cffi: end */

#endif
