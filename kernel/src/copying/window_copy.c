/*
 * Copy a window into a plain target, piece by piece through one buffer. Data that zeros surround is kept at the start of
 * the buffer until there is enough of it: each write waits for those of other threads.
 */
#include <string.h>

#include "common.h"
#include "copying/internal.h"
#include "engine/bytes.h"

/* Where the next piece of the ranges begins. */
struct place_in_ranges {
    uint64_t index, offset; /* `offset` bytes of the range at `index` are in pieces before */
};

/* The next ranges, of at most `room` bytes; their number, 0 at the end. A cut lies between two granules. */
static size_t next_piece(const tapfs_window *window, uint64_t room, struct place_in_ranges *at, tapfs_range *piece)
{
    size_t count = 0;

    while (at->index < window->range_count && count < TAPFS_PIECE_RANGES && room > 0) {
        const tapfs_range *range = &window->ranges[at->index];
        uint64_t start = range->offset + at->offset, length = range->length - at->offset;
        if (length > room) {
            uint64_t stop = round_down(start + room, window->granule);
            if (stop <= start) {
                if (count > 0) {
                    break; /* it fits into the next piece */
                }
                stop = start + room;
            }
            length = stop - start;
        }
        piece[count++] = (tapfs_range){.offset = start, .length = length};
        room -= length;
        at->offset += length;
        if (at->offset == range->length) {
            *at = (struct place_in_ranges){.index = at->index + 1};
        } else {
            break;
        }
    }
    return count;
}

static uint64_t total(const tapfs_segment *segments, size_t count)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < count; i++) {
        bytes += segments[i].length;
    }
    return bytes;
}

/* Segments that are not written yet, one behind the other from the start of the buffer on. */
struct kept {
    size_t count;
    uint64_t bytes;
};

/* Move the bytes of `found` segments, which lie in the buffer behind those that are kept, up to these. */
static void keep(const tapfs_window *window, struct kept *kept, size_t found)
{
    for (; found > 0; found--, kept->count++) {
        tapfs_segment *segment = &window->segments[kept->count];
        uint8_t *place = (uint8_t *)window->buffer + kept->bytes;
        memmove(place, segment->data, segment->length);
        segment->data = place;
        kept->bytes += segment->length;
    }
}

/* Whether more is read before this is written: there is little of it, and room for a granule behind it. */
static bool is_little(const tapfs_window *window, size_t count, uint64_t bytes)
{
    return count <= TAPFS_PIECE_RANGES && bytes <= window->buffer_bytes / 2 &&
           window->granule <= window->buffer_bytes / 4;
}

/* Bytes of the next piece: whole quarters of the buffer, so that what is kept cuts no cluster of the source. */
static uint64_t room_behind(const tapfs_window *window, const struct kept *kept)
{
    return kept->bytes == 0 ? window->buffer_bytes
                            : round_down(window->buffer_bytes - kept->bytes, window->buffer_bytes / 4);
}

/* A thread that waits for the lock of the file in the kernel spins, and takes the time of the one that reads. */
static bool write_kept(tapfs_window *window, struct kept *kept, pthread_mutex_t *writing)
{
    size_t count = kept->count;
    uint64_t bytes = kept->bytes;

    if (count == 0) {
        return true;
    }
    pthread_mutex_lock(writing);
    (void)tapfs_write_segments(window->target, window->segments, count, 0, NULL, 0, 0, &window->outcome);
    pthread_mutex_unlock(writing);
    if (window->outcome.status != TAPFS_DONE || window->outcome.done != bytes) {
        return false;
    }
    window->written += bytes;
    *kept = (struct kept){0};
    return true;
}

/* Scattered pages cost the host more here than in the page cache. What is left to the last barrier one thread does alone. */
static void start_writeback(const tapfs_window *window)
{
    const tapfs_range *first = window->ranges, *last = &window->ranges[window->range_count - 1];

    tapfs_start_writeback_of(window->target, first->offset, last->offset + last->length - first->offset);
}

void copy_window(tapfs_window *window, tapfs_disk *source, pthread_mutex_t *writing)
{
    struct place_in_ranges at = {0};
    struct kept kept = {0};
    tapfs_range piece[TAPFS_PIECE_RANGES];
    size_t count = 0, zeros = 0;

    while ((count = next_piece(window, room_behind(window, &kept), &at, piece)) > 0) {
        uint8_t *content = (uint8_t *)window->buffer + kept.bytes;
        tapfs_segment *segments = window->segments + kept.count;
        tapfs_read_ranges(source, piece, count, 0, content, &window->outcome);
        if (window->outcome.status != TAPFS_DONE) {
            return;
        }
        size_t found = tapfs_find_segments(piece, count, content, NULL, window->granule, segments, NULL, &zeros);
        uint64_t bytes = total(segments, found);
        if (is_little(window, kept.count + found, kept.bytes + bytes)) {
            keep(window, &kept, found);
            continue;
        }
        kept.count += found;
        kept.bytes += bytes;
        if (!write_kept(window, &kept, writing)) {
            return;
        }
    }
    window->copied = write_kept(window, &kept, writing);
    if (window->copied && window->written > 0) {
        start_writeback(window);
    }
}
