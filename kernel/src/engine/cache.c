/* The map cache: whole map units, found by (layer, unit). A lookup copies what it needs, so nothing that it returns
 * points into the cache.
 *
 * Units that were wanted again long after they came are proven. They are dropped only when they take more than
 * PROVEN_SHARE of the bound, so that a scan of the whole disk does not take the place of what is used all the time. */
#include <errno.h>
#include <stdlib.h>

#include "engine/unit.h"

/* Of 8 parts of the bound, those that proven units may take. */
#define PROVEN_SHARE 6
/* A unit is proven when it is wanted again after so many others came, or a part of as many as there are: a scan wants a
 * unit several times at once, beside other scans. */
#define PROVEN_AGE 8
#define PROVEN_AGE_PART 8

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
    struct unit_order *order = &cache->orders[unit->proven];
    *(unit->newer != NULL ? &unit->newer->older : &order->newest) = unit->older;
    *(unit->older != NULL ? &unit->older->newer : &order->oldest) = unit->newer;
    order->bytes -= unit_bytes(unit);
}

static void become_newest(struct cache *cache, struct unit *unit, bool proven)
{
    struct unit_order *order = &cache->orders[proven];
    unit->proven = proven;
    unit->newer = NULL;
    unit->older = order->newest;
    *(order->newest != NULL ? &order->newest->newer : &order->oldest) = unit;
    order->newest = unit;
    order->bytes += unit_bytes(unit);
}

uint64_t cache_bytes(const struct cache *cache)
{
    return cache->orders[0].bytes + cache->orders[1].bytes;
}

static void say_taken(struct cache *cache)
{
    atomic_store_explicit(&cache->taken, cache_bytes(cache), memory_order_relaxed);
}

static void drop(struct cache *cache, struct unit *unit)
{
    struct unit **link = bucket_of(cache, unit->layer, unit->index);
    while (*link != unit) {
        link = &(*link)->chain;
    }
    *link = unit->chain;
    leave_order(cache, unit);
    cache->unit_count--;
    say_taken(cache);
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
    for (size_t proven = 0; proven < 2; proven++) {
        for (struct unit *unit = cache->orders[proven].newest; unit != NULL; unit = unit->older) {
            struct unit **bucket = bucket_of(cache, unit->layer, unit->index);
            unit->chain = *bucket;
            *bucket = unit;
        }
    }
}

/* The unit that goes first: the oldest of those that are not proven, if there are any, but never `kept`. NULL: none. */
static struct unit *next_victim(const struct cache *cache, const struct unit *kept)
{
    for (size_t proven = 0; proven < 2; proven++) {
        struct unit *oldest = cache->orders[proven].oldest;
        if (oldest != NULL && oldest == kept) {
            oldest = oldest->newer;
        }
        if (oldest != NULL) {
            return oldest;
        }
    }
    return NULL;
}

static void insert(struct cache *cache, struct unit *unit)
{
    struct unit *old = find(cache, unit->layer, unit->index);
    bool proven = old != NULL && old->proven;
    unit->born = old != NULL ? old->born : cache->clock++;
    if (old != NULL) {
        drop(cache, old);
    }
    if (cache->unit_count >= cache->bucket_count) {
        spread(cache);
    }
    struct unit **bucket = bucket_of(cache, unit->layer, unit->index);
    unit->chain = *bucket;
    *bucket = unit;
    become_newest(cache, unit, proven);
    cache->unit_count++;
    /* Who brought the unit wants it: the request would never end if the unit went first. */
    while (cache_bytes(cache) > cache->limit && cache->unit_count > cache->least_units) {
        struct unit *victim = next_victim(cache, unit);
        if (victim == NULL) {
            break;
        }
        drop(cache, victim);
    }
    say_taken(cache);
}

/* A unit was wanted. */
static void touch(struct cache *cache, struct unit *unit)
{
    if (unit->ahead) {
        unit->ahead = false;
        unit->born = cache->clock; /* nobody has wanted it before */
    }
    bool proven = unit->proven ||
                  cache->clock - unit->born > maximum(PROVEN_AGE, cache->unit_count / PROVEN_AGE_PART);
    if (unit == cache->orders[proven].newest) {
        return;
    }
    leave_order(cache, unit);
    become_newest(cache, unit, proven);
    struct unit_order *order = &cache->orders[1];
    while (order->bytes > cache->limit / 8 * PROVEN_SHARE && order->oldest != unit) {
        struct unit *fallen = order->oldest;
        leave_order(cache, fallen);
        fallen->born = cache->clock;
        become_newest(cache, fallen, false);
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
    while (cache->unit_count > 0) {
        drop(cache, next_victim(cache, NULL));
    }
    free(cache->buckets);
    pthread_mutex_destroy(&cache->mutex);
}

/* With the mutex held. */
static size_t lookup(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset, uint64_t length,
                     tapfs_extent *runs, size_t capacity, bool *known)
{
    uint64_t inner = offset % map_unit;
    struct unit *unit = find(cache, layer, offset / map_unit);

    *known = unit != NULL;
    if (unit == NULL || inner >= unit->length) {
        return 0;
    }
    cache->hits++;
    touch(cache, unit);
    return unit_lookup(unit, offset - inner, inner, minimum(inner + length, unit->length), runs, capacity);
}

size_t cache_lookup_known(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset, uint64_t length,
                          tapfs_extent *runs, size_t capacity, bool *known)
{
    pthread_mutex_lock(&cache->mutex);
    size_t found = lookup(cache, layer, map_unit, offset, length, runs, capacity, known);
    pthread_mutex_unlock(&cache->mutex);
    return found;
}

size_t cache_lookup(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset, uint64_t length,
                    tapfs_extent *runs, size_t capacity)
{
    bool known;
    pthread_mutex_lock(&cache->mutex);
    size_t found = lookup(cache, layer, map_unit, offset, length, runs, capacity, &known);
    cache->misses += found == 0;
    pthread_mutex_unlock(&cache->mutex);
    return found;
}

bool cache_has(struct cache *cache, uint32_t layer, uint64_t index)
{
    pthread_mutex_lock(&cache->mutex);
    bool has = find(cache, layer, index) != NULL;
    pthread_mutex_unlock(&cache->mutex);
    return has;
}

static void free_chain(struct unit *unit)
{
    while (unit != NULL) {
        struct unit *next = unit->chain;
        free(unit);
        unit = next;
    }
}

int cache_install(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t virtual_size,
                  const tapfs_extent *extents, size_t count)
{
    uint64_t end = minimum(extents[count - 1].offset + extents[count - 1].length, round_up(virtual_size, map_unit));
    struct unit *built = NULL;
    size_t first = 0;

    for (uint64_t start = extents[0].offset; start < end; start += map_unit) {
        uint64_t stop = minimum(start + map_unit, end);
        struct unit *unit = unit_of_extents(layer, start / map_unit, extents, count, &first, start, stop);
        if (unit == NULL) {
            free_chain(built);
            return -ENOMEM;
        }
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

void cache_insert(struct cache *cache, struct unit *unit)
{
    insert(cache, unit);
}

static void patch_unit(struct cache *cache, uint32_t layer, uint64_t index, uint64_t base, const tapfs_extent *extents,
                       size_t count)
{
    struct unit *unit = find(cache, layer, index);
    if (unit == NULL) {
        return;
    }
    struct unit *fresh = unit->length > 0 ? unit_patched(unit, base, extents, count) : NULL;
    if (fresh != NULL) {
        insert(cache, fresh);
    } else {
        drop(cache, unit); /* without memory, or without runs: it is asked for again */
    }
}

void cache_patch(struct cache *cache, uint32_t layer, uint64_t map_unit, const tapfs_extent *extents, size_t count)
{
    uint64_t base = 0, stop = 0;

    for (size_t first = 0, next; first < count; first = next) {
        base = maximum(stop, round_down(extents[first].offset, map_unit));
        stop = base + map_unit;
        for (next = first; next < count && extents[next].offset < stop; next++) {
        }
        patch_unit(cache, layer, base / map_unit, base, &extents[first], next - first);
        if (extents[next - 1].offset + extents[next - 1].length > stop) {
            next--; /* it goes on in the next unit */
        }
    }
}

void cache_forget(struct cache *cache, uint32_t layer, uint64_t first, uint64_t last)
{
    if (last - first >= cache->unit_count) {
        for (size_t proven = 0; proven < 2; proven++) {
            for (struct unit *unit = cache->orders[proven].newest, *next; unit != NULL; unit = next) {
                next = unit->older;
                if (unit->layer == layer && unit->index >= first && unit->index <= last) {
                    drop(cache, unit);
                }
            }
        }
        return;
    }
    for (uint64_t index = first; index <= last; index++) {
        struct unit *unit = find(cache, layer, index);
        if (unit != NULL) {
            drop(cache, unit);
        }
    }
}
