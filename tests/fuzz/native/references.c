/*
 * Tables of a hostile image as a check counts them: any entries are counted within the counters that there are, counting
 * and marking agree which entry is the first that cannot be true, and what was raised can be lowered again. An input is the
 * shape of the tables and of the counters, and the entries.
 */
#include "engine/references.h"
#include "fuzz.h"

#define CLUSTERS 512u

int LLVMFuzzerInitialize(int *count, char ***words)
{
    (void)count;
    (void)words;
    return 0;
}

static void *zeros(size_t bytes)
{
    void *memory = calloc(1, bytes == 0 ? 1 : bytes);
    HOLD(memory != NULL);
    return memory;
}

static void count_all(const tapfs_references *layout, const uint8_t *entries, size_t count, uint32_t width, uint32_t times,
                      uint64_t base)
{
    tapfs_counted counted = {
        .base = base, .clusters = CLUSTERS, .counts = zeros((size_t)CLUSTERS * width), .windows = zeros(8), .window_count = 8,
        .window_bits = 6, .width = width, .skip_owned = times % 2};
    size_t end = tapfs_count_references(layout, entries, 0, count, times, &counted);
    HOLD(end <= count);
    uint8_t *alone = zeros(CLUSTERS / 8), *others = zeros(CLUSTERS / 8), *each = zeros(CLUSTERS);
    tapfs_owners owners = {.base = base, .clusters = CLUSTERS, .alone = alone, .others = others, .windows = counted.windows,
                           .window_count = 8, .window_bits = 6, .table = times % 4};
    size_t marked = tapfs_mark_owners(layout, entries, 0, count, &owners);
    HOLD(marked <= count && (counted.full || owners.doubled || marked == end));
    HOLD(tapfs_find_ownership(layout, entries, 0, count, base, CLUSTERS, each) <= count);
    memset(each, 1, CLUSTERS);
    uint8_t *copy = malloc(count * (layout->bitmaps ? 16 : 8) + 1);
    HOLD(copy != NULL);
    memcpy(copy, entries, count * (layout->bitmaps ? 16 : 8));
    HOLD(tapfs_mark_owned(layout, copy, 0, count, base, CLUSTERS, each) <= count);
    free(copy);
    free(counted.counts);
    free(counted.windows);
    free(alone);
    free(others);
    free(each);
}

/* What is raised and lowered again is as it was. */
static void raise_all(struct input *input, uint32_t order, uint32_t width)
{
    size_t count = take_byte(input) + 1u, bytes = ((count << order) + 7) / 8, sectors = bytes / 512 + 1;
    uint8_t *counters = zeros(bytes), *before = zeros(bytes), *times = zeros(count * width), *changed = zeros(sectors),
            *freed = zeros(count);

    take_bytes(input, counters, bytes);
    take_bytes(input, times, count * width);
    memcpy(before, counters, bytes);
    size_t end = tapfs_raise_counts(counters, order, times, width, count, changed);
    HOLD(end <= count);
    tapfs_lower_counts(counters, order, times, width, end, changed, freed);
    HOLD(memcmp(counters, before, bytes) == 0);
    HOLD(tapfs_find_uncounted(counters, order, 0, count, freed, 0) <= count);
    free(counters);
    free(before);
    free(times);
    free(changed);
    free(freed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    uint8_t shape = take_byte(&input), times = take_byte(&input);
    uint32_t bits = 9 + (shape & 7), width = 1 + (shape >> 3 & 1);
    tapfs_references layout = {
        .place_mask = 0x00fffffffffffe00,
        .zero_mask = 1,
        .impossible_mask = 0x3f00000000000000 | 0x1fe,
        .owned_mask = 1ull << 63,
        .packed_mask = 1ull << 62,
        .packed_impossible_mask = 1ull << 63,
        .packed_place_mask = (1ull << (70 - bits)) - 1,
        .packed_length_mask = (1u << (bits - 8)) - 1,
        .packed_length_shift = 70 - bits,
        .file_size = (uint64_t)take_byte(&input) << (bits + 2),
        .least_place = 1u << bits,
        .reserved = {(uint64_t)take_byte(&input) << bits, (uint64_t)take_byte(&input) << bits},
        .cluster_bits = bits,
        .bitmaps = shape >> 4 & 1,
        .packed_bytes = shape >> 5 & 1,
    };
    if (shape >> 6 == 3) {
        raise_all(&input, shape & 7 ? (shape & 7) - 1 : 0, width);
        return 0;
    }
    if (layout.packed_length_shift >= 62) {
        layout.packed_length_shift = 61;
    }
    size_t count = input.left / (layout.bitmaps ? 16 : 8);
    uint8_t *entries = malloc(input.left + 1);
    HOLD(entries != NULL);
    take_bytes(&input, entries, input.left);
    count_all(&layout, entries, count, width, times, (shape >> 6 & 1) * 64u);
    free(entries);
    return 0;
}
