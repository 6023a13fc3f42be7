/* The map of one layer: from the cache, else from the tables of the format, else from the layer's owner (MISS). */
#include "engine/internal.h"

int map_lookup(tapfs_disk *disk, uint32_t index, uint64_t offset, uint64_t length, bool nowait, tapfs_extent *runs,
               size_t capacity, size_t *count)
{
    const struct layer *layer = disk->layers[index];

    *count = cache_lookup(&disk->cache, index, layer->cached_unit, offset, length, runs, capacity);
    if (*count == 0 && layer->table != NULL) {
        return table_fill(disk, index, offset, length, nowait, runs, capacity, count);
    }
    return *count > 0 ? MAP_FOUND : MAP_MISSING;
}
