/* A cached map unit: pack its runs, look them up, change them. */
#include <stdlib.h>

#include "engine/unit.h"

#define START_MASK (MAP_UNIT_MAX - 1)
#define IN_PLACE_BIT (UINT64_C(1) << 63)
/* A BROKEN run is packed as a ZERO one with this detail: two bits have no room for a fifth kind. */
#define BROKEN_DETAIL 1

static struct packed_run pack(const tapfs_extent *extent, uint64_t start, uint64_t shift)
{
    uint64_t detail = extent->kind == TAPFS_COMPRESSED ? extent->host_length | (uint64_t)extent->file << 22
                      : extent->kind == TAPFS_DATA     ? extent->file
                      : extent->kind == TAPFS_BROKEN   ? BROKEN_DETAIL
                                                       : 0;
    uint64_t kind = extent->kind == TAPFS_BROKEN ? TAPFS_ZERO : extent->kind;
    bool placed = extent->kind == TAPFS_DATA || extent->kind == TAPFS_COMPRESSED;
    uint64_t host = !placed ? 0 : extent->kind == TAPFS_DATA ? extent->host_offset + shift : extent->host_offset;
    bool in_place = extent->kind == TAPFS_DATA && extent->in_place != 0;
    return (struct packed_run){
        .low = start | kind << 30 | detail << 32,
        .high = host | (in_place ? IN_PLACE_BIT : 0),
    };
}

static bool is_broken(const struct packed_run *run)
{
    return (run->low >> 30 & 3) == TAPFS_ZERO && run->low >> 32 == BROKEN_DETAIL;
}

static uint64_t run_start(const struct packed_run *run)
{
    return run->low & START_MASK;
}

/* `skip` is that of the run's start. */
static void unpack(const struct packed_run *run, uint64_t offset, uint64_t length, uint64_t shift, uint64_t skip,
                   tapfs_extent *extent)
{
    uint64_t kind = run->low >> 30 & 3;
    uint64_t detail = run->low >> 32;
    bool compressed = kind == TAPFS_COMPRESSED;
    *extent = (tapfs_extent){
        .offset = offset,
        .length = length,
        .host_offset = (run->high & ~IN_PLACE_BIT) + (kind == TAPFS_DATA ? shift : 0),
        .host_length = compressed ? detail & COMPRESSED_LENGTH_MAX : 0,
        .file = (uint32_t)(compressed ? detail >> 22 : kind == TAPFS_DATA ? detail : 0),
        .skip = compressed ? (uint32_t)(skip + shift) : 0,
        .kind = (uint8_t)(is_broken(run) ? TAPFS_BROKEN : kind),
        .in_place = (run->high & IN_PLACE_BIT) != 0,
    };
}

bool extents_join(const tapfs_extent *left, const tapfs_extent *right)
{
    if (left->kind != right->kind || left->depth != right->depth || left->kind == TAPFS_COMPRESSED) {
        return false;
    }
    return left->kind != TAPFS_DATA ||
           (left->file == right->file && (left->in_place != 0) == (right->in_place != 0) &&
            left->host_offset + left->length == right->host_offset);
}

static struct unit *unit_new(const struct table *table, uint32_t layer, uint64_t index, uint32_t length,
                             uint32_t count)
{
    bool merged = layer == MERGED_LAYER;
    uint64_t bytes = table != NULL ? count : (uint64_t)count * (sizeof(struct packed_run) + (merged ? 1 : 0));
    struct unit *unit = malloc(sizeof *unit + bytes);
    if (unit != NULL) {
        *unit = (struct unit){
            .table = table, .layer = layer, .index = index, .length = length, .count = count, .merged = merged};
    }
    return unit;
}

struct unit *unit_for_table(const struct table *table, uint32_t layer, uint64_t index, uint32_t length,
                            uint32_t bytes)
{
    return unit_new(table, layer, index, length, bytes);
}

struct unit *unit_of_kind(uint8_t kind, uint32_t layer, uint64_t index, uint32_t length)
{
    struct unit *unit = unit_new(NULL, layer, index, length, 1);
    if (unit != NULL) {
        tapfs_extent extent = {.length = length, .kind = kind};
        unit->runs[0] = pack(&extent, 0, 0);
    }
    return unit;
}

/* The runs of [start, stop) from extents[first] on, joined; counted only when `unit` is NULL. */
static uint32_t pack_unit(const tapfs_extent *extents, size_t count, size_t first, uint64_t start, uint64_t stop,
                          struct unit *unit)
{
    uint32_t packed = 0;
    for (size_t i = first; i < count && extents[i].offset < stop; i++) {
        if (i > first && extents_join(&extents[i - 1], &extents[i])) {
            continue;
        }
        uint64_t at = maximum(extents[i].offset, start);
        if (unit != NULL) {
            unit->runs[packed] = pack(&extents[i], at - start, at - extents[i].offset);
        }
        if (unit != NULL && unit->merged) {
            unit_layers(unit)[packed] = (uint8_t)extents[i].depth;
        }
        packed++;
    }
    return packed;
}

struct unit *unit_of_extents(uint32_t layer, uint64_t index, const tapfs_extent *extents, size_t count, size_t *first,
                             uint64_t start, uint64_t stop)
{
    while (extents[*first].offset + extents[*first].length <= start) {
        (*first)++;
    }
    uint32_t runs = pack_unit(extents, count, *first, start, stop, NULL);
    struct unit *unit = unit_new(NULL, layer, index, (uint32_t)(stop - start), runs);
    if (unit != NULL) {
        pack_unit(extents, count, *first, start, stop, unit);
        uint64_t before = maximum(extents[*first].offset, start) - extents[*first].offset;
        unit->skip = extents[*first].skip + (uint32_t)before;
    }
    return unit;
}

/* ---- looking up */

/* The last run that starts at or before `inner`. Runs are mostly spread evenly, so it is near where it would be then. */
static uint32_t search(const struct unit *unit, uint64_t inner)
{
    uint32_t low = (uint32_t)(inner * unit->count / unit->length), high, step = 1;

    if (run_start(&unit->runs[low]) <= inner) {
        for (high = low + 1; high < unit->count && run_start(&unit->runs[high]) <= inner; step *= 2) {
            low = high;
            high += step;
        }
        high = (uint32_t)minimum(high, unit->count);
    } else {
        for (high = low; low > 0 && run_start(&unit->runs[low]) > inner; step *= 2) {
            high = low;
            low = low > step ? low - step : 0;
        }
    }
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (run_start(&unit->runs[middle]) <= inner) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Up to the first BROKEN run, unless these are wanted, too: for a request the map is missing there. */
static size_t runs_lookup(const struct unit *unit, uint64_t base, uint64_t inner, uint64_t stop, bool broken_too,
                          tapfs_extent *runs, size_t capacity)
{
    size_t found = 0;
    for (uint32_t i = search(unit, inner); inner < stop && found < capacity; i++) {
        if (!broken_too && is_broken(&unit->runs[i])) {
            break;
        }
        uint64_t end = minimum(stop, i + 1 < unit->count ? run_start(&unit->runs[i + 1]) : unit->length);
        unpack(&unit->runs[i], base + inner, end - inner, inner - run_start(&unit->runs[i]), i == 0 ? unit->skip : 0,
               &runs[found]);
        runs[found].depth = unit->merged ? ((const uint8_t *)(unit->runs + unit->count))[i] : 0;
        found++;
        inner = end;
    }
    return found;
}

size_t unit_lookup(const struct unit *unit, uint64_t base, uint64_t inner, uint64_t stop, tapfs_extent *runs,
                   size_t capacity)
{
    return unit->table != NULL ? table_runs(unit->table, (const uint8_t *)unit->runs,
                                            table_entries(unit->table, unit->length), base, inner, stop, runs, capacity)
                               : runs_lookup(unit, base, inner, stop, false, runs, capacity);
}

/* ---- changing */

/* All extents of a unit that begins at `base`, in memory of the caller's; their number, 0 without memory. */
static size_t all_runs(const struct unit *unit, uint64_t base, tapfs_extent **runs)
{
    size_t count = unit->count;
    if (unit->table != NULL) {
        count = table_runs(unit->table, (const uint8_t *)unit->runs, table_entries(unit->table, unit->length), 0, 0,
                           unit->length, NULL, SIZE_MAX);
    }
    *runs = malloc(count * sizeof **runs);
    if (*runs == NULL) {
        return 0;
    }
    return unit->table != NULL ? unit_lookup(unit, base, 0, unit->length, *runs, count)
                               : runs_lookup(unit, base, 0, unit->length, true, *runs, count);
}

struct unit *unit_compacted(struct unit *unit)
{
    /* Most tables that stay as they are show it long before their end. */
    size_t enough = unit->count / sizeof unit->runs[0] + 1, first = 0;
    tapfs_extent *extents = malloc(enough * sizeof *extents);
    size_t count = extents == NULL ? enough : unit_lookup(unit, 0, 0, unit->length, extents, enough);
    struct unit *smaller = NULL;

    if (count < enough && count * sizeof unit->runs[0] < unit->count) {
        smaller = unit_of_extents(unit->layer, unit->index, extents, count, &first, 0, unit->length);
    }
    free(extents);
    if (smaller == NULL) {
        return unit;
    }
    free(unit);
    return smaller;
}

/* Append what the extents from extents[*next] on have of [start, stop); how many. Later calls ask for what lies behind. */
static size_t append_parts(const tapfs_extent *extents, size_t count, size_t *next, uint64_t start, uint64_t stop,
                           tapfs_extent *parts)
{
    size_t total = 0;

    for (; start < stop && *next < count && extents[*next].offset < stop; (*next)++) {
        const tapfs_extent *extent = &extents[*next];
        uint64_t end = extent->offset + extent->length;
        uint64_t first = maximum(extent->offset, start), last = minimum(end, stop);
        if (first < last) {
            parts[total] = *extent;
            parts[total].offset = first;
            parts[total].length = last - first;
            parts[total++].host_offset += extent->kind == TAPFS_DATA ? first - extent->offset : 0;
        }
        if (end > stop) {
            break;
        }
    }
    return total;
}

/* The extents of [start, stop) with the changes put in, where there are any; their number. */
static size_t splice(const tapfs_extent *extents, size_t extent_count, const tapfs_extent *changes, size_t count,
                     uint64_t start, uint64_t stop, tapfs_extent *spliced)
{
    size_t total = 0, next = 0;

    for (size_t i = 0; i < count && changes[i].offset < stop; i++) {
        size_t only = 0;
        total += append_parts(extents, extent_count, &next, start, changes[i].offset, spliced + total);
        total += append_parts(&changes[i], 1, &only, start, stop, spliced + total);
        start = maximum(start, changes[i].offset + changes[i].length);
    }
    return total + append_parts(extents, extent_count, &next, start, stop, spliced + total);
}

struct unit *unit_patched(const struct unit *unit, uint64_t base, const tapfs_extent *extents, size_t count)
{
    uint64_t end = base + unit->length;
    tapfs_extent *old = NULL, *spliced = NULL;
    struct unit *result = NULL;
    size_t old_count = all_runs(unit, base, &old), first = 0;

    if (old_count > 0) {
        /* Each change cuts at most one old extent in two. */
        spliced = malloc((old_count + 2 * count) * sizeof *spliced);
    }
    if (spliced != NULL) {
        size_t total = splice(old, old_count, extents, count, base, end, spliced);
        result = unit_of_extents(unit->layer, unit->index, spliced, total, &first, base, end);
    }
    free(spliced);
    free(old);
    return result;
}
