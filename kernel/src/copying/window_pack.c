/* Pack the granules of a window that was read; those of zeros are left out. */
#include <errno.h>

#include "common.h"
#include "copying/internal.h"

static void fail(tapfs_window *window, int error)
{
    window->unit_count = 0;
    window->outcome = (tapfs_outcome){.status = TAPFS_FAILED, .error = error, .operation = "compress"};
}

/* The granules of one range, whose bytes lie in the buffer from `start` on; `end` is where `packed` goes on. 0 or -errno. */
static int pack_range(tapfs_window *window, tapfs_packers *packers, const tapfs_range *range, uint64_t start, uint64_t *end)
{
    const uint8_t *content = (const uint8_t *)window->buffer + start;

    if (range->length % window->granule != 0) {
        return -EINVAL;
    }
    for (uint64_t inside = 0; inside < range->length; inside += window->granule) {
        if (tapfs_is_zero(content + inside, window->granule)) {
            continue;
        }
        tapfs_packed_unit *unit = &window->units[window->unit_count];
        *unit = (tapfs_packed_unit){.offset = range->offset + inside, .at = *end};
        int error = tapfs_pack(packers, window->codec, content + inside, window->granule, window->packed + *end,
                               &unit->length);
        if (error != 0) {
            return error;
        }
        if (unit->length == 0) {
            unit->at = start + inside;
        }
        *end += unit->length;
        window->unit_count++;
    }
    return 0;
}

void pack_window(tapfs_window *window, tapfs_packers **packers)
{
    uint64_t start = 0, end = 0;

    if (*packers == NULL) {
        *packers = tapfs_packers_new();
    }
    window->unit_count = 0;
    int error = *packers == NULL ? -ENOMEM : 0;
    for (uint64_t i = 0; i < window->range_count && error == 0; i++) {
        error = pack_range(window, *packers, &window->ranges[i], start, &end);
        start += window->ranges[i].length;
    }
    if (error != 0) {
        fail(window, -error);
    }
}

void tapfs_pack_window(tapfs_window *window)
{
    tapfs_packers *packers = NULL;

    window->outcome = (tapfs_outcome){.status = TAPFS_DONE};
    pack_window(window, &packers);
    tapfs_packers_free(packers);
}
