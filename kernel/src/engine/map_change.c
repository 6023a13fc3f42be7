/* Changes of what the cache has of a layer's map: checked, put in, patched, forgotten. The owner of the map makes them. */
#include <errno.h>

#include "engine/internal.h"

static bool extent_valid(const struct layer *layer, const tapfs_extent *extent, uint64_t offset)
{
    const tapfs_layer *geometry = &layer->geometry;
    if (extent->offset != offset || extent->length == 0 || !in_host_range(offset, extent->length)) {
        return false;
    }
    if (extent->kind == TAPFS_DATA) {
        return extent->file < layer->file_count && in_host_range(extent->host_offset, extent->length) &&
               (layer->cipher == NULL || offset % geometry->cipher.sector_bytes == 0);
    }
    if (extent->kind == TAPFS_COMPRESSED) {
        return geometry->packing.codec != TAPFS_CODEC_NONE && offset % geometry->granule == 0 &&
               extent->length % geometry->granule == 0 &&
               (geometry->packing.own_units ? extent->skip : offset % geometry->packed_unit) + extent->length <=
                   geometry->packed_unit &&
               extent->file < layer->file_count &&
               extent->file <= COMPRESSED_FILE_MAX && extent->host_length > 0 &&
               extent->host_length <= COMPRESSED_LENGTH_MAX &&
               in_host_range(extent->host_offset, extent->host_length);
    }
    return extent->kind == TAPFS_ZERO || extent->kind == TAPFS_UNALLOCATED || extent->kind == TAPFS_BROKEN;
}

int tapfs_disk_install(tapfs_disk *disk, uint32_t index, const tapfs_extent *extents, size_t count)
{
    const struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || layer->geometry.identity || count == 0) {
        return -EINVAL;
    }
    const tapfs_layer *geometry = &layer->geometry;
    uint64_t end = extents[0].offset;
    if (end % geometry->map_unit != 0 || end >= geometry->virtual_size) {
        return -EINVAL;
    }
    for (size_t i = 0; i < count; i++) {
        if (!extent_valid(layer, &extents[i], end)) {
            return -EINVAL;
        }
        end += extents[i].length;
    }
    if (end % geometry->map_unit != 0 && end < geometry->virtual_size) {
        return -EINVAL;
    }
    int error = cache_install(&disk->cache, index, layer->cached_unit, geometry->virtual_size, extents, count);
    pthread_mutex_lock(&disk->cache.mutex);
    merged_forget(disk, extents[0].offset, end);
    pthread_mutex_unlock(&disk->cache.mutex);
    unpacked_shrink(&disk->codec.units);
    return error;
}

int tapfs_disk_patch(tapfs_disk *disk, uint32_t index, const tapfs_extent *extents, size_t count)
{
    const struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || layer->geometry.identity || count == 0) {
        return -EINVAL;
    }
    uint64_t map_unit = layer->geometry.map_unit, granule = layer->geometry.granule, end = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t start = extents[i].offset;
        bool gap = start > end && start % granule == 0 && end % granule == 0;
        if ((start != end && !gap) || !extent_valid(layer, &extents[i], start)) {
            return -EINVAL;
        }
        end = start + extents[i].length;
    }
    if (end % granule != 0) {
        return -EINVAL;
    }
    pthread_mutex_lock(&disk->cache.mutex);
    for (size_t i = 0; i < count; i++) {
        uint64_t last = extents[i].offset + extents[i].length - 1;
        table_changed(layer->table, extents[i].offset / map_unit, last / map_unit);
    }
    cache_patch(&disk->cache, index, layer->cached_unit, extents, count);
    merged_patch(disk, index, extents, count);
    pthread_mutex_unlock(&disk->cache.mutex);
    return 0;
}

void tapfs_disk_forget(tapfs_disk *disk, uint32_t index, uint64_t offset, uint64_t length)
{
    const struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || layer->geometry.identity || length == 0) {
        return;
    }
    uint64_t last = length > UINT64_MAX - offset ? UINT64_MAX : offset + length - 1;

    pthread_mutex_lock(&disk->cache.mutex);
    table_changed(layer->table, offset / layer->geometry.map_unit, last / layer->geometry.map_unit);
    cache_forget(&disk->cache, index, offset / layer->cached_unit, last / layer->cached_unit);
    merged_forget(disk, offset, length > UINT64_MAX - offset ? UINT64_MAX : offset + length);
    pthread_mutex_unlock(&disk->cache.mutex);
}
