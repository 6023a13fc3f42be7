/* Locate a range of the virtual disk on the host: through the chain by the map cache, run by run. */
#include "mover/internal.h"

#define EXTENTS_AT_ONCE 8

static void stop_at(struct route *route, int32_t status, uint32_t layer, uint64_t offset, uint64_t length)
{
    probe_stop(status, layer, offset, length);
    route->stop = status;
    route->stop_layer = layer;
    route->stop_offset = offset;
    route->stop_length = length;
}

static bool continues(const struct run *last, const struct run *run)
{
    return last->file == run->file &&
           (run->file == NULL || last->host_offset + last->length == run->host_offset);
}

/* False: no room. */
static bool append(struct route *route, const struct run *run)
{
    struct run *last = route->count > 0 ? &route->runs[route->count - 1] : NULL;
    if (last != NULL && continues(last, run)) {
        last->length += run->length;
        return true;
    }
    if (route->count == ROUTE_RUNS) {
        return false;
    }
    route->runs[route->count++] = *run;
    return true;
}

static struct run run_of(const struct layer *layer, uint32_t index, const tapfs_extent *extent)
{
    return (struct run){
        .offset = extent->offset,
        .length = extent->length,
        .host_offset = extent->host_offset,
        .file = layer->files[extent->file],
        .layer = index,
        .file_index = extent->file,
    };
}

/* The extents at `offset` of a layer without identity. False: the route says why there are none; the engine's own
 * functions, which may wait, read a table that is not in the host's memory. */
static bool mapped_runs(tapfs_disk *disk, uint32_t index, uint64_t offset, uint64_t length, tapfs_extent *extents,
                        size_t capacity, size_t *count, struct route *route)
{
    switch (map_lookup(disk, index, offset, length, true, extents, capacity, count)) {
    case MAP_FOUND:
        return true;
    case MAP_MISSING:
        stop_at(route, TAPFS_MISS, index, offset, length);
        return false;
    default:
        route->by_engine = true;
        return false;
    }
}

/* The run of an extent that nothing lies below. False: the engine's own functions read it. */
static bool use_extent(const tapfs_disk *disk, uint32_t index, const tapfs_extent *extent, struct run *run,
                       struct route *route)
{
    const struct layer *layer = disk->layers[index];

    if (extent->kind == TAPFS_ZERO || extent->kind == TAPFS_UNALLOCATED) {
        *run = (struct run){.offset = extent->offset, .length = extent->length};
        return true;
    }
    if (route->by_engine || extent->kind == TAPFS_COMPRESSED || layer->cipher != NULL ||
        host_absent(layer->files[extent->file], extent->host_offset, extent->length) ||
        host_leaves_window(layer->files[extent->file], extent->host_offset, extent->length)) {
        route->by_engine = true;
        return false;
    }
    *run = run_of(layer, index, extent);
    return true;
}

/* The run at `offset`, at most `length` long. False: the route says why there is none. */
static bool find_run(tapfs_disk *disk, uint64_t offset, uint64_t length, struct run *run, struct route *route)
{
    tapfs_extent merged;
    size_t merged_count = 0;
    uint64_t stop;

    if (merged_lookup(disk, offset, offset + length, true, true, &merged, 1, &merged_count, &stop) == MAP_FOUND) {
        return use_extent(disk, merged.depth, &merged, run, route);
    }
    for (uint32_t index = 0;; index++) {
        const struct layer *layer = disk_layer(disk, index);
        if (layer == NULL || offset >= layer->geometry.virtual_size) {
            *run = (struct run){.offset = offset, .length = length};
            return true;
        }
        const tapfs_layer *geometry = &layer->geometry;
        tapfs_extent extent = {
            .offset = offset,
            .length = minimum(length, geometry->virtual_size - offset),
            .host_offset = geometry->identity_offset + offset,
            .file = geometry->identity_file,
            .kind = TAPFS_DATA,
        };
        if (geometry->identity) {
            route->by_engine = geometry->identity_file >= layer->file_count;
        } else {
            size_t count = 0;
            if (!mapped_runs(disk, index, offset, extent.length, &extent, 1, &count, route)) {
                return false;
            }
        }
        length = extent.length;
        if (extent.kind != TAPFS_UNALLOCATED) {
            return use_extent(disk, index, &extent, run, route);
        }
    }
}

static void locate_read(tapfs_disk *disk, uint64_t offset, uint64_t end, struct route *route)
{
    struct run run;
    for (uint64_t at = offset; at < end; at += run.length) {
        if (!find_run(disk, at, end - at, &run, route) || !append(route, &run)) {
            return;
        }
    }
}

/* In place runs of a mapped layer, then what needs a reservation, as tapfs_write reports it. */
static void locate_mapped_write(tapfs_disk *disk, const struct layer *layer, uint64_t offset, uint64_t end,
                                struct route *route)
{
    uint64_t at = offset, gap = UINT64_MAX;

    while (at < end) {
        tapfs_extent found[EXTENTS_AT_ONCE];
        size_t count = 0;
        if (!mapped_runs(disk, 0, at, end - at, found, EXTENTS_AT_ONCE, &count, route)) {
            break;
        }
        for (size_t i = 0; i < count; i++) {
            if (found[i].kind != TAPFS_DATA || !found[i].in_place || guarded(disk, &found[i])) {
                gap = minimum(gap, found[i].offset);
            } else if (gap != UINT64_MAX) {
                stop_at(route, TAPFS_RESERVE, 0, gap, found[i].offset - gap);
                return;
            } else {
                struct run run = run_of(layer, 0, &found[i]);
                if (!append(route, &run)) {
                    return;
                }
            }
            at = found[i].offset + found[i].length;
        }
    }
    if (gap != UINT64_MAX) {
        route->by_engine = false;
        stop_at(route, TAPFS_RESERVE, 0, gap, at - gap);
    }
}

static void locate_write(tapfs_disk *disk, const struct layer *layer, uint64_t offset, uint64_t end,
                         struct route *route)
{
    route->by_engine = !layer->geometry.writable || layer->cipher != NULL ||
                       layer->geometry.identity_file >= layer->file_count;
    if (route->by_engine) {
        return;
    }
    if (atomic_load(&disk->sealed)) {
        stop_at(route, TAPFS_RESERVE, 0, offset, end - offset);
        return;
    }
    if (layer->geometry.identity) {
        tapfs_extent whole = {
            .offset = offset,
            .length = end - offset,
            .host_offset = layer->geometry.identity_offset + offset,
            .file = layer->geometry.identity_file,
        };
        struct run run = run_of(layer, 0, &whole);
        append(route, &run);
        return;
    }
    locate_mapped_write(disk, layer, offset, end, route);
}

void locate(tapfs_disk *disk, bool writing, uint64_t offset, uint64_t length, struct route *route)
{
    const struct layer *top = disk_layer(disk, 0);
    uint64_t size = top == NULL ? 0 : top->geometry.virtual_size;

    route->count = 0;
    route->by_engine = offset > size || length > size - offset;
    route->stop = TAPFS_DONE;
    if (route->by_engine) {
        return;
    }
    if (writing) {
        locate_write(disk, top, offset, offset + length, route);
    } else {
        locate_read(disk, offset, offset + length, route);
    }
}
