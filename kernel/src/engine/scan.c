/* Look for zeros, data and differences in plain memory. */
#include <string.h>

#include "engine/bytes.h"

/* 32 bytes at any address; the compiler picks the registers. */
typedef uint64_t lanes __attribute__((vector_size(32), aligned(1), may_alias));

#define BLOCK_BYTES (4 * sizeof(lanes))

static int lanes_zero(const unsigned char *bytes)
{
    const lanes *block = (const lanes *)(const void *)bytes;
    lanes all = (block[0] | block[1]) | (block[2] | block[3]);
    return (all[0] | all[1] | all[2] | all[3]) == 0;
}

int tapfs_is_zero(const void *buffer, uint64_t length)
{
    const unsigned char *bytes = buffer;
    uint64_t at = 0;

    for (; length - at >= BLOCK_BYTES; at += BLOCK_BYTES) {
        if (!lanes_zero(bytes + at)) {
            return 0;
        }
    }
    for (; at < length; at++) {
        if (bytes[at] != 0) {
            return 0;
        }
    }
    return 1;
}

size_t tapfs_find_data(const void *buffer, uint64_t length, uint64_t granule, uint64_t *runs, size_t capacity,
                       uint64_t *scanned)
{
    const unsigned char *bytes = buffer;
    size_t found = 0;
    int inside = 0;
    uint64_t at = 0;

    while (at < length) {
        uint64_t part = granule == 0 || length - at < granule ? length - at : granule;
        int data = !tapfs_is_zero(bytes + at, part);
        if (data && inside) {
            runs[2 * found - 1] += part;
        } else if (data) {
            if (found == capacity) {
                break;
            }
            runs[2 * found] = at;
            runs[2 * found + 1] = part;
            found++;
        }
        inside = data;
        at += part;
    }
    *scanned = at;
    return found;
}

uint64_t tapfs_first_difference(const void *left, const void *right, uint64_t length)
{
    const unsigned char *a = left, *b = right;
    uint64_t at = 0;

    for (uint64_t step = 4096; step != 0; step = step == 4096 ? 64 : step == 64 ? 1 : 0) {
        while (length - at >= step && memcmp(a + at, b + at, step) == 0) {
            at += step;
        }
    }
    return at;
}
