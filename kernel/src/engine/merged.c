/*
 * The map of the whole chain in one: for a piece of the disk the runs of all layers, each with the layer that gives it.
 * So a chain of many layers costs one look at the cache, as one layer does.
 *
 * Of the layers below the top only one that another disk writes changes (a live commit). What changes a map changes or drops the merged units in the same critical
 * section (merged_patch, merged_forget), and moves their stamp. A unit that was made from lookups before that is not
 * cached (kernel/src/engine/CONCURRENCY.md).
 */
#include <stdlib.h>

#include "engine/unit.h"

/* Of the smallest granule of the chain a merged unit has so many, within these bounds. */
#define UNIT_GRANULES 512u
#define UNIT_BYTES_MIN (64u << 10)
#define UNIT_BYTES_MAX (64u << 20)
/* What making one may cost; where it would cost more the layers are looked at one by one. */
#define RUNS_MAX 4096u
#define LOOKUPS_MAX 16384u
/* Runs that one lookup brings to the stack. */
#define RUNS_AT_ONCE 24

void merged_set_unit(tapfs_disk *disk)
{
    uint64_t granule = UINT64_MAX;

    disk->merged_unit = 0;
    for (uint32_t i = 0; i < disk->layer_count; i++) {
        const tapfs_layer *geometry = &disk->layers[i]->geometry;
        if (geometry->packing.own_units) {
            return; /* a run in a merged unit does not say where in its payload it begins */
        }
        granule = geometry->identity ? granule : minimum(granule, geometry->granule);
    }
    if (disk->layer_count > 1 && !disk->layers[0]->geometry.identity) {
        uint64_t bytes = granule > UNIT_BYTES_MAX / UNIT_GRANULES ? UNIT_BYTES_MAX : granule * UNIT_GRANULES;
        disk->merged_unit = maximum(bytes, UNIT_BYTES_MIN);
    }
}

/* ---- making one */

struct merging {
    tapfs_disk *disk;
    tapfs_extent *runs;
    size_t count;
    uint32_t lookups_left;
    bool nowait;
    bool too_much;
};

static bool append(struct merging *merging, const tapfs_extent *extent, uint32_t layer)
{
    tapfs_extent run = *extent;
    run.depth = (uint16_t)layer;
    tapfs_extent *last = merging->count > 0 ? &merging->runs[merging->count - 1] : NULL;

    if (last != NULL && extents_join(last, &run)) {
        last->length += run.length;
        return true;
    }
    merging->too_much = merging->count == RUNS_MAX;
    if (merging->too_much) {
        return false;
    }
    merging->runs[merging->count++] = run;
    return true;
}

static bool merge(struct merging *merging, uint32_t index, uint64_t offset, uint64_t end);

static bool merge_mapped(struct merging *merging, uint32_t index, uint64_t offset, uint64_t end)
{
    const tapfs_disk *disk = merging->disk;
    tapfs_extent runs[RUNS_AT_ONCE];

    while (offset < end) {
        size_t count = 0;
        uint64_t absent = table_absent_until(disk->layers[index], offset, end);
        merging->too_much = merging->lookups_left-- == 0;
        if (merging->too_much) {
            return false;
        }
        if (absent > offset) {
            runs[count++] = (tapfs_extent){
                .offset = offset, .length = absent - offset, .kind = table_absent_kind(disk->layers[index])};
        } else if (map_lookup(merging->disk, index, offset, end - offset, merging->nowait, runs, RUNS_AT_ONCE,
                              &count) != MAP_FOUND) {
            return false;
        }
        for (size_t i = 0; i < count; i++) {
            const tapfs_extent *run = &runs[i];
            bool below = run->kind == TAPFS_UNALLOCATED && index + 1 < disk->layer_count;
            if (below ? !merge(merging, index + 1, run->offset, run->offset + run->length)
                      : !append(merging, run, index)) {
                return false;
            }
        }
        offset = runs[count - 1].offset + runs[count - 1].length;
    }
    return true;
}

/* The runs of [offset, end), which the layers above leave to this one. */
static bool merge(struct merging *merging, uint32_t index, uint64_t offset, uint64_t end)
{
    const struct layer *layer = merging->disk->layers[index];
    const tapfs_layer *geometry = &layer->geometry;
    uint64_t inside = minimum(end, geometry->virtual_size);

    if (offset < inside && geometry->identity) {
        const tapfs_extent whole = {
            .offset = offset,
            .length = inside - offset,
            .host_offset = geometry->identity_offset + offset,
            .file = geometry->identity_file,
            .kind = TAPFS_DATA,
        };
        if (geometry->identity_file >= layer->file_count || !append(merging, &whole, index)) {
            return false;
        }
    } else if (offset < inside && !merge_mapped(merging, index, offset, inside)) {
        return false;
    }
    if (maximum(offset, inside) < end) {
        /* Past the end of a shorter parent are the child's own zeros, whatever lies below. */
        uint64_t start = maximum(offset, inside);
        const tapfs_extent zeros = {.offset = start, .length = end - start, .kind = TAPFS_UNALLOCATED};
        return append(merging, &zeros, index - 1);
    }
    return true;
}

/* A unit whose length is 0 says that this one would cost too much. NULL: the map of a layer is lacking, or memory. */
static struct unit *make_unit(tapfs_disk *disk, uint64_t index, bool nowait)
{
    uint64_t start = index * disk->merged_unit;
    uint64_t stop = minimum(start + disk->merged_unit, disk->layers[0]->geometry.virtual_size);
    struct merging merging = {.disk = disk, .nowait = nowait, .lookups_left = LOOKUPS_MAX};
    struct unit *unit = NULL;
    size_t first = 0;

    merging.runs = malloc(RUNS_MAX * sizeof *merging.runs);
    if (merging.runs == NULL) {
        return NULL;
    }
    if (merge(&merging, 0, start, stop)) {
        unit = unit_of_extents(MERGED_LAYER, index, merging.runs, merging.count, &first, start, stop);
    } else if (merging.too_much) {
        unit = unit_of_kind(TAPFS_ZERO, MERGED_LAYER, index, 0);
    }
    free(merging.runs);
    return unit;
}

/* ---- looking up */

/* Whether the unit is worth being made: the map of the highest layer that has tables here was wanted before. */
static bool wanted_before(tapfs_disk *disk, uint64_t offset, bool empty_too)
{
    for (uint32_t i = 0; i < disk->layer_count; i++) {
        const struct layer *layer = disk->layers[i];
        if (layer->geometry.identity || offset >= layer->geometry.virtual_size) {
            break;
        }
        if (table_absent_until(layer, offset, offset + 1) == offset) {
            return cache_has(&disk->cache, i, offset / layer->cached_unit);
        }
    }
    return empty_too;
}

int merged_lookup(tapfs_disk *disk, uint64_t offset, uint64_t end, bool empty_too, bool nowait, tapfs_extent *runs,
                  size_t capacity, size_t *count, uint64_t *stop)
{
    *stop = end;
    if (disk->merged_unit == 0) {
        return MAP_MISSING;
    }
    struct cache *cache = &disk->cache;
    uint64_t index = offset / disk->merged_unit, start = index * disk->merged_unit;
    *stop = minimum(end, start + disk->merged_unit);
    bool known = false;
    *count = cache_lookup_known(cache, MERGED_LAYER, disk->merged_unit, offset, *stop - offset, runs, capacity, &known);
    if (*count > 0) {
        return MAP_FOUND;
    }
    if (known || !wanted_before(disk, offset, empty_too)) {
        return MAP_MISSING;
    }
    _Atomic uint64_t *stamp = &disk->merged_stamps[index % MERGED_STAMPS];
    uint64_t before = atomic_load(stamp);
    struct unit *unit = make_unit(disk, index, nowait);
    if (unit == NULL) {
        return MAP_MISSING;
    }
    pthread_mutex_lock(&cache->mutex);
    if (atomic_load(stamp) == before) {
        cache_insert(cache, unit);
        *count = unit_lookup(unit, start, offset - start, minimum(*stop - start, unit->length), runs, capacity);
    } else {
        free(unit);
    }
    pthread_mutex_unlock(&cache->mutex);
    unpacked_shrink(&disk->codec.units);
    return *count > 0 ? MAP_FOUND : MAP_MISSING;
}

/* ---- changes, with the mutex of the cache held */

static void move_stamps(tapfs_disk *disk, uint64_t first, uint64_t last)
{
    uint64_t count = minimum(last - first + 1, MERGED_STAMPS);
    for (uint64_t i = 0; i < count; i++) {
        atomic_fetch_add(&disk->merged_stamps[(first + i) % MERGED_STAMPS], 1);
    }
}

void merged_forget(tapfs_disk *disk, uint64_t offset, uint64_t end)
{
    if (disk->merged_unit != 0 && offset < end) {
        uint64_t first = offset / disk->merged_unit, last = (end - 1) / disk->merged_unit;
        move_stamps(disk, first, last);
        cache_forget(&disk->cache, MERGED_LAYER, first, last);
    }
}

void merged_patch(tapfs_disk *disk, uint32_t layer, const tapfs_extent *extents, size_t count)
{
    bool shows_parents = layer != 0;

    for (size_t i = 0; i < count && !shows_parents; i++) {
        shows_parents = extents[i].kind == TAPFS_UNALLOCATED;
    }
    for (size_t i = 0; i < count && disk->merged_unit != 0; i++) {
        uint64_t offset = extents[i].offset, end = offset + extents[i].length;
        if (shows_parents) {
            merged_forget(disk, offset, end);
        } else {
            move_stamps(disk, offset / disk->merged_unit, (end - 1) / disk->merged_unit);
        }
    }
    if (!shows_parents && disk->merged_unit != 0) {
        cache_patch(&disk->cache, MERGED_LAYER, disk->merged_unit, extents, count);
    }
}
