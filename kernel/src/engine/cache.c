/* The map cache: whole map units as packed runs, found by (layer, unit), least recently used out
 * first. A lookup copies what it needs, so nothing that it returns points into the cache. */
#include <errno.h>
#include <stdlib.h>

#include "engine/internal.h"

/*
 * A run in 16 bytes; it ends where the next one starts.
 * low: start in the unit (30 bits), kind (2), DATA: file (32), COMPRESSED: host_length (22), file (10)
 * high: host_offset (63), in_place (1)
 */
struct packed_run {
    uint64_t low, high;
};

struct unit {
    struct unit *chain;
    struct unit *newer, *older;
    uint64_t index;
    uint32_t layer;
    uint32_t length; /* bytes of the disk that the runs cover */
    uint32_t count;
    struct packed_run runs[];
};

/* What a unit costs beyond itself: its share of the buckets and the allocator's header. */
#define UNIT_OVERHEAD 32u
#define START_MASK (MAP_UNIT_MAX - 1)
#define IN_PLACE_BIT (UINT64_C(1) << 63)

static struct packed_run pack(const tapfs_extent *extent, uint64_t start, uint64_t shift)
{
    uint64_t detail = extent->kind == TAPFS_COMPRESSED ? extent->host_length | (uint64_t)extent->file << 22
                      : extent->kind == TAPFS_DATA     ? extent->file
                                                       : 0;
    bool placed = extent->kind == TAPFS_DATA || extent->kind == TAPFS_COMPRESSED;
    uint64_t host = !placed ? 0 : extent->kind == TAPFS_DATA ? extent->host_offset + shift : extent->host_offset;
    bool in_place = extent->kind == TAPFS_DATA && extent->in_place != 0;
    return (struct packed_run){
        .low = start | (uint64_t)extent->kind << 30 | detail << 32,
        .high = host | (in_place ? IN_PLACE_BIT : 0),
    };
}

static uint64_t run_start(const struct packed_run *run)
{
    return run->low & START_MASK;
}

static void unpack(const struct packed_run *run, uint64_t offset, uint64_t length, uint64_t shift,
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
        .file = (uint32_t)(compressed ? detail >> 22 : detail),
        .kind = (uint8_t)kind,
        .in_place = (run->high & IN_PLACE_BIT) != 0,
    };
}

static uint64_t unit_bytes(const struct unit *unit)
{
    return sizeof *unit + UNIT_OVERHEAD + (uint64_t)unit->count * sizeof unit->runs[0];
}

static struct unit **bucket_of(const struct cache *cache, uint32_t layer, uint64_t index)
{
    uint64_t hash = (index + ((uint64_t)layer << 48)) * UINT64_C(0x9e3779b97f4a7c15);
    return &cache->buckets[(hash >> 20) & (cache->bucket_count - 1)];
}

static struct unit *find(const struct cache *cache, uint32_t layer, uint64_t index)
{
    struct unit *unit = *bucket_of(cache, layer, index);
    while (unit != NULL && (unit->index != index || unit->layer != layer)) {
        unit = unit->chain;
    }
    return unit;
}

static void leave_order(struct cache *cache, struct unit *unit)
{
    *(unit->newer != NULL ? &unit->newer->older : &cache->newest) = unit->older;
    *(unit->older != NULL ? &unit->older->newer : &cache->oldest) = unit->newer;
}

static void become_newest(struct cache *cache, struct unit *unit)
{
    unit->newer = NULL;
    unit->older = cache->newest;
    *(cache->newest != NULL ? &cache->newest->newer : &cache->oldest) = unit;
    cache->newest = unit;
}

static void drop(struct cache *cache, struct unit *unit)
{
    struct unit **link = bucket_of(cache, unit->layer, unit->index);
    while (*link != unit) {
        link = &(*link)->chain;
    }
    *link = unit->chain;
    leave_order(cache, unit);
    cache->bytes -= unit_bytes(unit);
    cache->unit_count--;
    free(unit);
}

/* More buckets when there are more units; without memory the chains just get longer. */
static void spread(struct cache *cache)
{
    size_t count = cache->bucket_count * 2;
    struct unit **buckets = calloc(count, sizeof(struct unit *));
    if (buckets == NULL) {
        return;
    }
    free(cache->buckets);
    cache->buckets = buckets;
    cache->bucket_count = count;
    for (struct unit *unit = cache->newest; unit != NULL; unit = unit->older) {
        struct unit **bucket = bucket_of(cache, unit->layer, unit->index);
        unit->chain = *bucket;
        *bucket = unit;
    }
}

static void insert(struct cache *cache, struct unit *unit)
{
    struct unit *old = find(cache, unit->layer, unit->index);
    if (old != NULL) {
        drop(cache, old);
    }
    if (cache->unit_count >= cache->bucket_count) {
        spread(cache);
    }
    struct unit **bucket = bucket_of(cache, unit->layer, unit->index);
    unit->chain = *bucket;
    *bucket = unit;
    become_newest(cache, unit);
    cache->bytes += unit_bytes(unit);
    cache->unit_count++;
    while (cache->bytes > cache->limit && cache->unit_count > cache->least_units) {
        drop(cache, cache->oldest);
    }
}

int cache_init(struct cache *cache, uint64_t limit)
{
    *cache = (struct cache){.limit = limit, .bucket_count = 64};
    cache->buckets = calloc(cache->bucket_count, sizeof(struct unit *));
    if (cache->buckets == NULL) {
        return ENOMEM;
    }
    pthread_mutex_init(&cache->mutex, NULL);
    return 0;
}

void cache_destroy(struct cache *cache)
{
    while (cache->oldest != NULL) {
        drop(cache, cache->oldest);
    }
    free(cache->buckets);
    pthread_mutex_destroy(&cache->mutex);
}

/* The last run that starts at or before `inner`. */
static uint32_t search(const struct unit *unit, uint64_t inner)
{
    uint32_t low = 0, high = unit->count;
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

size_t cache_lookup(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset, uint64_t length,
                    tapfs_extent *runs, size_t capacity)
{
    uint64_t inner = offset % map_unit;
    size_t found = 0;

    pthread_mutex_lock(&cache->mutex);
    struct unit *unit = find(cache, layer, offset / map_unit);
    if (unit == NULL || inner >= unit->length) {
        cache->misses++;
        pthread_mutex_unlock(&cache->mutex);
        return 0;
    }
    cache->hits++;
    if (unit != cache->newest) {
        leave_order(cache, unit);
        become_newest(cache, unit);
    }
    uint64_t base = offset - inner;
    uint64_t stop = minimum(inner + length, unit->length);
    for (uint32_t i = search(unit, inner); inner < stop && found < capacity; i++) {
        uint64_t end = minimum(stop, i + 1 < unit->count ? run_start(&unit->runs[i + 1]) : unit->length);
        unpack(&unit->runs[i], base + inner, end - inner, inner - run_start(&unit->runs[i]), &runs[found++]);
        inner = end;
    }
    pthread_mutex_unlock(&cache->mutex);
    return found;
}

static bool joins(const tapfs_extent *left, const tapfs_extent *right)
{
    if (left->kind != right->kind || left->kind == TAPFS_COMPRESSED) {
        return false;
    }
    return left->kind != TAPFS_DATA ||
           (left->file == right->file && (left->in_place != 0) == (right->in_place != 0) &&
            left->host_offset + left->length == right->host_offset);
}

/* The runs of [start, stop) from extents[first] on, merged; counted only when `runs` is NULL. */
static uint32_t pack_unit(const tapfs_extent *extents, size_t count, size_t first, uint64_t start, uint64_t stop,
                          struct packed_run *runs)
{
    uint32_t packed = 0;
    for (size_t i = first; i < count && extents[i].offset < stop; i++) {
        if (i > first && joins(&extents[i - 1], &extents[i])) {
            continue;
        }
        uint64_t at = maximum(extents[i].offset, start);
        if (runs != NULL) {
            runs[packed] = pack(&extents[i], at - start, at - extents[i].offset);
        }
        packed++;
    }
    return packed;
}

int cache_install(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t virtual_size,
                  const tapfs_extent *extents, size_t count)
{
    uint64_t end = minimum(extents[count - 1].offset + extents[count - 1].length, round_up(virtual_size, map_unit));
    struct unit *built = NULL;
    size_t first = 0;

    for (uint64_t start = extents[0].offset; start < end; start += map_unit) {
        uint64_t stop = minimum(start + map_unit, end);
        while (extents[first].offset + extents[first].length <= start) {
            first++;
        }
        uint32_t runs = pack_unit(extents, count, first, start, stop, NULL);
        struct unit *unit = malloc(sizeof *unit + runs * sizeof unit->runs[0]);
        if (unit == NULL) {
            while (built != NULL) {
                struct unit *next = built->chain;
                free(built);
                built = next;
            }
            return -ENOMEM;
        }
        pack_unit(extents, count, first, start, stop, unit->runs);
        unit->index = start / map_unit;
        unit->layer = layer;
        unit->length = (uint32_t)(stop - start);
        unit->count = runs;
        unit->chain = built;
        built = unit;
    }
    pthread_mutex_lock(&cache->mutex);
    while (built != NULL) {
        struct unit *next = built->chain;
        insert(cache, built);
        built = next;
    }
    pthread_mutex_unlock(&cache->mutex);
    return 0;
}

/* The runs of a unit with those of [start, stop) replaced by `extents`, which cover that; their number. */
static size_t splice_runs(const struct unit *unit, uint64_t base, const tapfs_extent *extents, size_t count,
                          uint64_t start, uint64_t stop, tapfs_extent *runs)
{
    uint64_t unit_end = base + unit->length;
    size_t spliced = 0;

    for (uint32_t i = 0; i < unit->count; i++) {
        uint64_t from = base + run_start(&unit->runs[i]);
        uint64_t to = i + 1 < unit->count ? base + run_start(&unit->runs[i + 1]) : unit_end;
        if (from < start) {
            unpack(&unit->runs[i], from, minimum(to, start) - from, 0, &runs[spliced++]);
        }
        if (from <= start && start < to) {
            for (size_t j = 0; j < count; j++) {
                uint64_t first = maximum(extents[j].offset, start);
                uint64_t last = minimum(extents[j].offset + extents[j].length, stop);
                if (first < last) {
                    runs[spliced] = extents[j];
                    runs[spliced].offset = first;
                    runs[spliced].length = last - first;
                    runs[spliced++].host_offset += extents[j].kind == TAPFS_DATA ? first - extents[j].offset : 0;
                }
            }
        }
        if (to > stop) {
            uint64_t rest = maximum(from, stop);
            unpack(&unit->runs[i], rest, to - rest, rest - from, &runs[spliced++]);
        }
    }
    return spliced;
}

static struct unit *patched(const struct unit *unit, uint64_t base, const tapfs_extent *extents, size_t count)
{
    uint64_t unit_end = base + unit->length;
    uint64_t start = maximum(extents[0].offset, base);
    uint64_t stop = minimum(extents[count - 1].offset + extents[count - 1].length, unit_end);
    struct unit *result = NULL;
    tapfs_extent *runs = malloc((unit->count + count + 2) * sizeof *runs);

    if (runs != NULL) {
        size_t spliced = splice_runs(unit, base, extents, count, start, stop, runs);
        uint32_t packed = pack_unit(runs, spliced, 0, base, unit_end, NULL);
        result = malloc(sizeof *result + packed * sizeof result->runs[0]);
        if (result != NULL) {
            pack_unit(runs, spliced, 0, base, unit_end, result->runs);
            result->index = unit->index;
            result->layer = unit->layer;
            result->length = unit->length;
            result->count = packed;
        }
        free(runs);
    }
    return result;
}

void cache_patch(struct cache *cache, uint32_t layer, uint64_t map_unit, const tapfs_extent *extents, size_t count)
{
    uint64_t end = extents[count - 1].offset + extents[count - 1].length;

    pthread_mutex_lock(&cache->mutex);
    for (uint64_t base = round_down(extents[0].offset, map_unit); base < end; base += map_unit) {
        struct unit *unit = find(cache, layer, base / map_unit);
        if (unit == NULL) {
            continue;
        }
        struct unit *fresh = patched(unit, base, extents, count);
        if (fresh != NULL) {
            insert(cache, fresh);
        } else {
            drop(cache, unit); /* without memory it is asked for again */
        }
    }
    pthread_mutex_unlock(&cache->mutex);
}

void cache_forget(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset, uint64_t length)
{
    if (length == 0) {
        return;
    }
    uint64_t first = offset / map_unit;
    uint64_t last = (length > UINT64_MAX - offset ? UINT64_MAX : offset + length - 1) / map_unit;

    pthread_mutex_lock(&cache->mutex);
    if (last - first >= cache->unit_count) {
        for (struct unit *unit = cache->newest, *next; unit != NULL; unit = next) {
            next = unit->older;
            if (unit->layer == layer && unit->index >= first && unit->index <= last) {
                drop(cache, unit);
            }
        }
    } else {
        for (uint64_t index = first; index <= last; index++) {
            struct unit *unit = find(cache, layer, index);
            if (unit != NULL) {
                drop(cache, unit);
            }
        }
    }
    pthread_mutex_unlock(&cache->mutex);
}
