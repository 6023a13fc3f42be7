/*
 * Windows of a disk that threads read and search for zeros, and pack, while their owner writes those before. The owner is one
 * thread; it works, too, whenever it would otherwise wait for work that nobody has begun. Where the target is plain, who
 * reads writes, too: the bytes are still in the processor's cache, and the owner has nothing to do.
 */
#ifndef TAPFS_COPYING_H
#define TAPFS_COPYING_H

#include "engine/engine.h"

/* cffi: begin */

/* A granule with data of a window that is packed. */
typedef struct {
    uint64_t offset; /* in the disk */
    uint64_t at;     /* of its payload in `packed`, or of itself in `buffer` */
    uint64_t length; /* of its payload; 0: it does not shrink */
} tapfs_packed_unit;

/* A piece that is copied has so many ranges at most. */
#define TAPFS_PIECE_RANGES 64

/*
 * Ranges that are read into `buffer`, one behind the other, and what of them is data (`tapfs_find_segments`, without
 * `below`). `outcome` says how the read ended; only after DONE there are `segment_count` segments.
 *
 * With a `target`, a plain disk that is as large, the ranges are copied instead, in pieces of at most `buffer_bytes`, and
 * `segments` has room for those of one piece and TAPFS_PIECE_RANGES more. `written` bytes of data are in the target then,
 * all of them if it is `copied`, and the host begins to write them. If not, `outcome` says why, and what is written may
 * be written again.
 *
 * With a `codec` the ranges are whole granules. They are read, and each granule that is no zeros becomes a unit, in their
 * order; payloads follow one another in `packed`, which is as large as the ranges. `units` has room for all granules.
 */
typedef struct {
    const tapfs_range *ranges;
    uint64_t range_count;
    void *buffer;
    uint64_t granule;
    tapfs_segment *segments;
    uint64_t segment_count;
    tapfs_outcome outcome;
    tapfs_disk *target; /* NULL: they are only read */
    uint64_t buffer_bytes;
    uint64_t written;
    uint8_t copied; /* 1: all of them */
    uint32_t codec; /* TAPFS_CODEC_NONE: they are not packed */
    uint8_t *packed;
    tapfs_packed_unit *units;
    uint64_t unit_count;
} tapfs_window;

typedef struct tapfs_window_reader tapfs_window_reader;

/* At most `capacity` windows at a time, read by at most `threads` threads besides the owner. NULL: no memory. Fewer
 * threads, even none, are no error: the owner does what they do not. */
tapfs_window_reader *tapfs_window_reader_new(tapfs_disk *disk, uint32_t threads, uint32_t capacity);
/* Ends the threads; windows that are being read are waited for, others are left as they are. */
void tapfs_window_reader_free(tapfs_window_reader *reader);
/* Have a window read, behind the others. It stays the reader's until it is taken. 0, or ENOSPC for one too many. */
int tapfs_window_reader_add(tapfs_window_reader *reader, tapfs_window *window);
/* Whether the window that was added first is read already: 1, else 0. */
int tapfs_window_reader_ready(tapfs_window_reader *reader);
/* The window that was added first, once it is read; NULL: there is none. */
tapfs_window *tapfs_window_reader_take(tapfs_window_reader *reader);

/* Pack a window whose buffer somebody else has filled, in the caller's thread; `outcome` says how that ended. */
void tapfs_pack_window(tapfs_window *window);

/* cffi: end */

#endif
