/* Raise and lower counters that stand on a disk: of 1 to 64 bits, many in one call (`engine/references.h`). */
#include <stdbool.h>

#include "common.h"
#include "engine/references.h"

#define SECTOR_BITS (512u * 8)
#define BYTE_ORDER_BITS 3u

struct counters {
    uint8_t *bytes;
    uint32_t order;
    uint64_t largest;
};

static struct counters counters_at(void *bytes, uint32_t order)
{
    uint64_t bits = UINT64_C(1) << order;
    return (struct counters){bytes, order, bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1};
}

static uint64_t load(const struct counters *counters, size_t index)
{
    if (counters->order < BYTE_ORDER_BITS) {
        size_t bit = index << counters->order;
        return (uint64_t)counters->bytes[bit / 8] >> bit % 8 & counters->largest;
    }
    size_t width = (size_t)1 << (counters->order - BYTE_ORDER_BITS);
    uint64_t number = 0;
    for (size_t i = 0; i < width; i++) {
        number = number << 8 | counters->bytes[index * width + i];
    }
    return number;
}

static void store(const struct counters *counters, size_t index, uint64_t number)
{
    if (counters->order < BYTE_ORDER_BITS) {
        size_t bit = index << counters->order;
        uint8_t *byte = &counters->bytes[bit / 8];
        *byte = (uint8_t)((*byte & ~(counters->largest << bit % 8)) | number << bit % 8);
        return;
    }
    size_t width = (size_t)1 << (counters->order - BYTE_ORDER_BITS);
    for (size_t i = width; i > 0; i--, number >>= 8) {
        counters->bytes[index * width + i - 1] = (uint8_t)number;
    }
}

static uint64_t times_of(const void *times, uint32_t width, size_t index)
{
    return width == 1 ? ((const uint8_t *)times)[index] : ((const uint16_t *)times)[index];
}

static void note_sector(const struct counters *counters, size_t index, uint8_t *sectors)
{
    sectors[(index << counters->order) / SECTOR_BITS] = 1;
}

size_t tapfs_raise_counts(void *counters, uint32_t order, const void *times, uint32_t width, size_t count,
                          uint8_t *sectors)
{
    const struct counters block = counters_at(counters, order);

    for (size_t i = 0; i < count; i++) {
        uint64_t more = times_of(times, width, i);
        if (more == 0) {
            continue;
        }
        uint64_t number = load(&block, i);
        if (number == 0 || more > block.largest - number) {
            return i;
        }
        store(&block, i, number + more);
        note_sector(&block, i, sectors);
    }
    return count;
}

size_t tapfs_find_uncounted(const void *counters, uint32_t order, size_t first, size_t count, const uint8_t *marks,
                            uint64_t mark)
{
    const struct counters block = counters_at((void *)(uintptr_t)counters, order);

    for (size_t i = 0; i < count; i++) {
        uint64_t at = mark + i;
        if (marks[at / 8] == 0) {
            i += (size_t)(7 - at % 8); /* none of this byte */
        } else if ((marks[at / 8] >> at % 8 & 1) != 0 && load(&block, first + i) == 0) {
            return i;
        }
    }
    return count;
}

size_t tapfs_lower_counts(void *counters, uint32_t order, const void *times, uint32_t width, size_t count,
                          uint8_t *sectors, uint8_t *freed)
{
    const struct counters block = counters_at(counters, order);
    size_t found = 0;

    for (size_t i = 0; i < count; i++) {
        uint64_t number, less = times_of(times, width, i);
        if (less == 0 || (number = load(&block, i)) == 0) {
            continue;
        }
        store(&block, i, number - minimum(less, number));
        note_sector(&block, i, sectors);
        if (less >= number) {
            freed[i] = 1;
            found++;
        }
    }
    return found;
}
