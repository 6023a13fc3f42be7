/* The map of one layer: from the cache, else from the tables of the format, else from the layer's owner (MISS). */
#include "engine/internal.h"
#include "engine/tables.h"

int map_lookup(tapfs_disk *disk, uint32_t index, uint64_t offset, uint64_t length, bool nowait, tapfs_extent *runs,
               size_t capacity, size_t *count)
{
    const struct layer *layer = disk->layers[index];
    uint64_t map_unit = layer->geometry.map_unit;

    *count = cache_lookup(&disk->cache, index, map_unit, offset, length, runs, capacity);
    while (*count == 0 && layer->table != NULL) {
        int filled = table_fill(disk, index, offset / map_unit, nowait);
        if (filled != MAP_FOUND) {
            return filled;
        }
        /* What was filled may have been pushed out by others in between. */
        *count = cache_lookup(&disk->cache, index, map_unit, offset, length, runs, capacity);
    }
    return *count > 0 ? MAP_FOUND : MAP_MISSING;
}
