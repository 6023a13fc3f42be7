/* A walk over the map of the whole chain: down the layers, run by run. What is done with a run is its taker's. */
#include "engine/chain_walk.h"
#include "engine/tables.h"

#define RUNS_AT_ONCE 64

static tapfs_mapped without_place(uint8_t kind, uint32_t layer, uint64_t offset, uint64_t length)
{
    return (tapfs_mapped){.offset = offset, .length = length, .layer = layer, .kind = kind};
}

static bool resolve(struct walk *walk, uint32_t index, uint64_t offset, uint64_t length);

static bool give(struct walk *walk, uint32_t index, const tapfs_extent *extent)
{
    const tapfs_disk *disk = walk->request.disk;
    tapfs_mapped run = without_place(extent->kind, index, extent->offset, extent->length);
    if (extent->kind == TAPFS_DATA || extent->kind == TAPFS_COMPRESSED) {
        run.file = extent->file;
        run.placed = extent->kind == TAPFS_DATA && disk->layers[index]->cipher == NULL;
        run.host_offset = run.placed ? extent->host_offset : 0;
    }
    return walk->take(walk, &run);
}

static bool take_extent(struct walk *walk, uint32_t index, const tapfs_extent *extent)
{
    const tapfs_disk *disk = walk->request.disk;

    if (extent->kind == TAPFS_UNALLOCATED && index + 1 < disk->layer_count) {
        return resolve(walk, index + 1, extent->offset, extent->length);
    }
    return give(walk, index, extent);
}

/* The file whose holes are holes of the identity; NULL: there are none, or nobody can tell. */
static struct host_file *file_with_holes(const struct layer *layer)
{
    struct host_file *file =
        layer->geometry.identity_file < layer->file_count ? layer->files[layer->geometry.identity_file] : NULL;

    /* A hole under a cipher does not read as zeros, and what is not here looks like a hole. */
    return file != NULL && layer->cipher == NULL && file->present == NULL ? file : NULL;
}

/* `*holes`: the host was believed that there are some. */
static bool take_identity(struct walk *walk, uint32_t index, uint64_t offset, uint64_t end, bool *holes)
{
    const struct layer *layer = walk->request.disk->layers[index];
    struct host_file *file = file_with_holes(layer);
    uint64_t shift = layer->geometry.identity_offset;

    for (bool data = file == NULL; offset < end; data = file == NULL || !data) {
        uint64_t stop = end;
        if (data) {
            stop = file == NULL ? end : host_next_hole(file, shift + offset, shift + end) - shift;
        } else {
            stop = host_next_data(file, shift + offset, shift + end) - shift;
            *holes |= stop > offset;
        }
        if (stop == offset) {
            continue; /* a hole of no bytes: it begins with data */
        }
        tapfs_mapped run = without_place(data ? TAPFS_DATA : TAPFS_ZERO, index, offset, stop - offset);
        run.placed = layer->cipher == NULL;
        run.file = layer->geometry.identity_file;
        run.host_offset = run.placed ? shift + offset : 0;
        if (walk->lookups_left-- == 0 || !walk->take(walk, &run)) {
            return false;
        }
        offset = stop;
    }
    return true;
}

/* What a file has lost at its end is no hole: it is asked for once the holes are known. */
static bool resolve_identity(struct walk *walk, uint32_t index, uint64_t offset, uint64_t end)
{
    const struct layer *layer = walk->request.disk->layers[index];
    uint32_t file = layer->geometry.identity_file;
    bool holes = false, more = take_identity(walk, index, offset, end, &holes);
    int error = holes ? host_look_for_cut(layer->files[file]) : 0;

    if (error != 0) {
        request_fail(&walk->request, error, "map", index, file, layer->geometry.identity_offset + offset);
        return false;
    }
    return more;
}

/* The same of a merged run: nothing lies below, but the holes of a raw file may be others by now. */
static bool take_merged(struct walk *walk, const tapfs_extent *extent)
{
    bool identity = walk->request.disk->layers[extent->depth]->geometry.identity != 0;
    return identity && extent->kind == TAPFS_DATA
               ? resolve_identity(walk, extent->depth, extent->offset, extent->offset + extent->length)
               : give(walk, extent->depth, extent);
}

static bool resolve_mapped(struct walk *walk, uint32_t index, uint64_t offset, uint64_t end)
{
    const struct layer *layer = walk->request.disk->layers[index];
    tapfs_extent runs[RUNS_AT_ONCE];

    while (offset < end) {
        if (walk->lookups_left-- == 0) {
            return false;
        }
        uint64_t stop = 0;
        size_t count = 0;
        bool merged = index == 0 && merged_lookup(walk->request.disk, offset, end, false, false, runs, RUNS_AT_ONCE,
                                                  &count, &stop) == MAP_FOUND;
        stop = merged ? offset : table_absent_until(layer, offset, end);
        if (merged) {
            /* It may have been made for this, out of the maps of all layers. */
            walk->lookups_left -= minimum(walk->lookups_left, walk->request.disk->layer_count);
        } else if (stop > offset) {
            runs[count++] = (tapfs_extent){
                .offset = offset, .length = stop - offset, .kind = layer->table->layout.absent_kind};
        } else if (map_lookup(walk->request.disk, index, offset, end - offset, false, runs, RUNS_AT_ONCE, &count) !=
                   MAP_FOUND) {
            request_stop(&walk->request, TAPFS_MISS, index, offset, end - offset);
            return false;
        }
        for (size_t i = 0; i < count; i++) {
            if (merged ? !take_merged(walk, &runs[i]) : !take_extent(walk, index, &runs[i])) {
                return false;
            }
        }
        offset = runs[count - 1].offset + runs[count - 1].length;
    }
    return true;
}

/* The map of [offset, offset + length), which a layer above leaves to this one. */
static bool resolve(struct walk *walk, uint32_t index, uint64_t offset, uint64_t length)
{
    const struct layer *layer = walk->request.disk->layers[index];
    uint64_t end = offset + length, inside = minimum(end, layer->geometry.virtual_size);

    if (offset < inside) {
        if (layer->geometry.identity ? !resolve_identity(walk, index, offset, inside)
                                     : !resolve_mapped(walk, index, offset, inside)) {
            return false;
        }
        offset = inside;
    }
    if (offset < end) {
        /* Past the end of a shorter parent are the child's own zeros, whatever lies below. */
        tapfs_mapped zeros = without_place(TAPFS_UNALLOCATED, index - 1, offset, end - offset);
        return walk->take(walk, &zeros);
    }
    return true;
}

void walk_chain(struct walk *walk, tapfs_disk *disk, uint64_t offset, uint64_t length, tapfs_outcome *outcome)
{
    const struct layer *top = disk_layer(disk, 0);
    uint64_t size = top == NULL ? 0 : top->geometry.virtual_size;

    request_begin(&walk->request, disk, outcome);
    walk->request.position = offset;
    if (offset > size || length > size - offset) {
        request_fail(&walk->request, ERANGE, "map", 0, 0, offset);
    } else if (length > 0) {
        resolve(walk, 0, offset, length);
    }
    request_end(&walk->request);
}
