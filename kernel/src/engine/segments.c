/* Segments that a copy has to write, of ranges that were read: the granules with data, or with a difference. */
#include <string.h>

#include "engine/internal.h"

struct search {
    uint64_t granule;
    tapfs_segment *segments;
    size_t count;
    tapfs_range *zeros; /* NULL: granules of zeros are left out */
    size_t zero_count;
};

static void add_segment(struct search *search, uint64_t offset, uint64_t length, const uint8_t *data)
{
    tapfs_segment *last = search->count > 0 ? &search->segments[search->count - 1] : NULL;

    if (last != NULL && last->offset + last->length == offset && last->data + last->length == data) {
        last->length += length;
    } else {
        search->segments[search->count++] = (tapfs_segment){.offset = offset, .length = length, .data = data};
    }
}

static void add_zeros(struct search *search, uint64_t offset, uint64_t length)
{
    tapfs_range *last = search->zero_count > 0 ? &search->zeros[search->zero_count - 1] : NULL;

    if (search->zeros == NULL || length == 0) {
        return;
    }
    if (last != NULL && last->offset + last->length == offset) {
        last->length += length;
    } else {
        search->zeros[search->zero_count++] = (tapfs_range){.offset = offset, .length = length};
    }
}

/* `below`: what the disk reads as without it; NULL: not known, so that every granule is written. */
static void search_range(struct search *search, const tapfs_range *range, const uint8_t *content, const uint8_t *below)
{
    uint64_t part = 0;

    for (uint64_t at = 0; at < range->length; at += part) {
        uint64_t offset = range->offset + at;
        part = minimum(search->granule - offset % search->granule, range->length - at);
        if (below != NULL && memcmp(content + at, below + at, part) == 0) {
            continue;
        }
        if (tapfs_is_zero(content + at, part)) {
            add_zeros(search, offset, part);
        } else {
            add_segment(search, offset, part, content + at);
        }
    }
}

size_t tapfs_find_segments(const tapfs_range *ranges, size_t count, const void *content, const void *below,
                           uint64_t granule, tapfs_segment *segments, tapfs_range *zeros, size_t *zero_count)
{
    struct search search = {.granule = granule, .segments = segments, .zeros = zeros};
    uint64_t before = 0;

    for (size_t i = 0; i < count; i++) {
        search_range(&search, &ranges[i], (const uint8_t *)content + before,
                     below == NULL ? NULL : (const uint8_t *)below + before);
        before += ranges[i].length;
    }
    *zero_count = search.zero_count;
    return search.count;
}
