/* Copy a window into a plain target, piece by piece through a buffer that the cache of a processor holds. */
#include "common.h"
#include "copying/internal.h"
#include "engine/bytes.h"

/* Where the next piece of the ranges begins. */
struct place_in_ranges {
    uint64_t index, offset; /* `offset` bytes of the range at `index` are in pieces before */
};

/* The next ranges, of at most `most` bytes; their number, 0 at the end. A cut lies between two granules. */
static size_t next_piece(const tapfs_window *window, struct place_in_ranges *at, tapfs_range *piece)
{
    uint64_t room = window->buffer_bytes;
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

void copy_window(tapfs_window *window, tapfs_disk *source, pthread_mutex_t *writing)
{
    struct place_in_ranges at = {0};
    tapfs_range piece[TAPFS_PIECE_RANGES];
    size_t count = 0, zeros = 0;

    while ((count = next_piece(window, &at, piece)) > 0) {
        tapfs_read_ranges(source, piece, count, 0, window->buffer, &window->outcome);
        if (window->outcome.status != TAPFS_DONE) {
            return;
        }
        size_t found = tapfs_find_segments(piece, count, window->buffer, NULL, window->granule, window->segments, NULL,
                                           &zeros);
        uint64_t wanted = total(window->segments, found);
        /* A thread that waits for the lock of the file in the kernel spins, and takes the time of the one that reads. */
        pthread_mutex_lock(writing);
        (void)tapfs_write_segments(window->target, window->segments, found, 0, NULL, 0, 0, &window->outcome);
        pthread_mutex_unlock(writing);
        if (window->outcome.status != TAPFS_DONE || window->outcome.done != wanted) {
            return;
        }
        window->written += wanted;
    }
    window->copied = 1;
}
