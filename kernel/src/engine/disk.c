/* The disk: its layers and files, and the requests that run on it. */
#include <errno.h>
#include <openssl/crypto.h>
#include <stdlib.h>

#include "engine/internal.h"

tapfs_disk *tapfs_disk_new(uint64_t cache_bytes)
{
    tapfs_disk *disk = calloc(1, sizeof *disk);
    if (disk == NULL) {
        return NULL;
    }
    if (cache_init(&disk->cache, cache_bytes) != 0) {
        free(disk);
        return NULL;
    }
    codec_init(&disk->codec, cache_bytes / 2, &disk->cache);
    range_lock_init(&disk->ranges);
    atomic_init(&disk->epoch, 0);
    atomic_init(&disk->running[0], 0);
    atomic_init(&disk->running[1], 0);
    atomic_init(&disk->quiescing, false);
    pthread_mutex_init(&disk->quiesce_lock, NULL);
    pthread_mutex_init(&disk->drain_lock, NULL);
    pthread_cond_init(&disk->drained, NULL);
    atomic_init(&disk->sealed, false);
    atomic_init(&disk->bytes_read, 0);
    atomic_init(&disk->bytes_written, 0);
    atomic_init(&disk->written, NULL);
    return disk;
}

static void layer_free(struct layer *layer)
{
    for (uint32_t i = 0; i < layer->file_count; i++) {
        host_file_free(layer->files[i]);
    }
    free(layer->files);
    table_free(layer->table);
    guard_destroy(&layer->guard);
    cipher_free(layer->cipher);
    free(layer);
}

void tapfs_disk_free(tapfs_disk *disk)
{
    if (disk == NULL) {
        return;
    }
    for (uint32_t i = 0; i < disk->layer_count; i++) {
        layer_free(disk->layers[i]);
    }
    free(disk->layers);
    written_free(disk);
    cache_destroy(&disk->cache);
    codec_destroy(&disk->codec);
    range_lock_destroy(&disk->ranges);
    pthread_cond_destroy(&disk->drained);
    pthread_mutex_destroy(&disk->drain_lock);
    pthread_mutex_destroy(&disk->quiesce_lock);
    free(disk);
}

void disk_note_foreign_writes(const tapfs_disk *disk)
{
    const struct layer *top = disk_layer(disk, 0);
    for (uint32_t i = 0; top != NULL && i < top->file_count; i++) {
        host_wrote(top->files[i]);
    }
}

static bool geometry_valid(const tapfs_layer *geometry)
{
    if (geometry->virtual_size > INT64_MAX - (uint64_t)MAP_UNIT_MAX || !packing_valid(&geometry->packing) ||
        (geometry->cipher.algorithm != TAPFS_CIPHER_NONE && !cipher_valid(&geometry->cipher))) {
        return false;
    }
    if (geometry->identity) {
        return in_host_range(geometry->identity_offset, geometry->virtual_size);
    }
    return geometry->granule > 0 && geometry->map_unit >= geometry->granule && geometry->map_unit <= MAP_UNIT_MAX &&
           geometry->map_unit % geometry->granule == 0 &&
           geometry->packed_unit > 0 && geometry->packed_unit % geometry->granule == 0 &&
           (geometry->packing.own_units ? !geometry->writable && geometry->packed_unit <= OWN_UNIT_MAX
                                        : geometry->map_unit % geometry->packed_unit == 0) &&
           (geometry->cipher.algorithm == TAPFS_CIPHER_NONE ||
            geometry->granule % geometry->cipher.sector_bytes == 0);
}

int tapfs_disk_add_layer(tapfs_disk *disk, const tapfs_layer *described)
{
    tapfs_layer complete = *described;
    const tapfs_layer *geometry = &complete;
    if (complete.packed_unit == 0) {
        complete.packed_unit = complete.granule;
    }
    if (!geometry_valid(geometry) || (geometry->writable && disk->layer_count > 0)) {
        return -EINVAL;
    }
    if (disk->layer_count >= LAYERS_MAX) {
        return -ELOOP;
    }
    struct layer **layers = realloc(disk->layers, (disk->layer_count + 1) * sizeof *layers);
    if (layers == NULL) {
        return -ENOMEM;
    }
    disk->layers = layers;
    struct layer *layer = calloc(1, sizeof *layer);
    if (layer == NULL) {
        return -ENOMEM;
    }
    /* The key goes to the cipher, and no other copy of it is kept. */
    OPENSSL_cleanse(complete.cipher.key, sizeof complete.cipher.key);
    layer->geometry = *geometry;
    layer->cached_unit = geometry->map_unit;
    guard_init(&layer->guard);
    if (geometry->cipher.algorithm != TAPFS_CIPHER_NONE) {
        layer->cipher = cipher_new(&described->cipher);
        if (layer->cipher == NULL) {
            int error = errno;
            layer_free(layer);
            return -error;
        }
    }
    layers[disk->layer_count++] = layer;
    /* A request may need a few units of every layer at once to make any progress. */
    disk->cache.least_units = 4 * (size_t)disk->layer_count + 4;
    merged_set_unit(disk);
    return (int)disk->layer_count - 1;
}

int tapfs_disk_add_file(tapfs_disk *disk, uint32_t index, int fd, uint32_t flags)
{
    struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || layer->file_count == INT32_MAX) {
        return -EINVAL;
    }
    struct host_file **files = realloc(layer->files, (layer->file_count + 1) * sizeof *files);
    if (files == NULL) {
        return -ENOMEM;
    }
    layer->files = files;
    int error = host_file_new(fd, (flags & TAPFS_FILE_DIRECT) != 0, (flags & TAPFS_FILE_WRITABLE) != 0,
                              &files[layer->file_count]);
    return error != 0 ? -error : (int)layer->file_count++;
}

int tapfs_disk_set_presence(tapfs_disk *disk, uint32_t index, uint32_t file_index, uint64_t block_bytes,
                            const uint8_t *present, uint64_t blocks)
{
    const struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || file_index >= layer->file_count || block_bytes == 0 || layer->files[file_index]->writable) {
        return -EINVAL;
    }
    struct host_file *file = layer->files[file_index];
    file->present = present;
    file->present_block_bytes = block_bytes;
    file->present_blocks = blocks;
    return 0;
}

int tapfs_disk_set_window(tapfs_disk *disk, uint32_t index, uint32_t file_index, uint64_t start, uint64_t length)
{
    const struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || file_index >= layer->file_count) {
        return -EINVAL;
    }
    return -host_file_set_window(layer->files[file_index], start, length);
}

void tapfs_disk_seal(tapfs_disk *disk, int sealed)
{
    atomic_store(&disk->sealed, sealed != 0);
}

void tapfs_disk_statistics(tapfs_disk *disk, tapfs_statistics *statistics)
{
    pthread_mutex_lock(&disk->cache.mutex);
    statistics->cache_hits = disk->cache.hits;
    statistics->cache_misses = disk->cache.misses;
    statistics->cache_fills = disk->cache.filled;
    statistics->cache_bytes = cache_bytes(&disk->cache);
    pthread_mutex_unlock(&disk->cache.mutex);
    statistics->bytes_read = atomic_load(&disk->bytes_read);
    statistics->bytes_written = atomic_load(&disk->bytes_written);
}

/*
 * A request counts itself in the epoch that it began in. If the epoch moved between looking and
 * counting, a quiesce may already have found that slot empty: try again in the new one.
 */
void request_begin(struct request *request, tapfs_disk *disk, tapfs_outcome *outcome)
{
    *outcome = (tapfs_outcome){.status = TAPFS_DONE};
    *request = (struct request){.disk = disk, .outcome = outcome};
    for (;;) {
        uint64_t epoch = atomic_load(&disk->epoch);
        request->epoch = (unsigned)(epoch & 1);
        atomic_fetch_add(&disk->running[request->epoch], 1);
        if (atomic_load(&disk->epoch) == epoch) {
            return;
        }
        request_end(request);
    }
}

void request_end(struct request *request)
{
    tapfs_disk *disk = request->disk;
    if (atomic_fetch_sub(&disk->running[request->epoch], 1) == 1 && atomic_load(&disk->quiescing)) {
        pthread_mutex_lock(&disk->drain_lock);
        pthread_cond_broadcast(&disk->drained);
        pthread_mutex_unlock(&disk->drain_lock);
    }
}

void tapfs_disk_quiesce(tapfs_disk *disk)
{
    pthread_mutex_lock(&disk->quiesce_lock);
    atomic_store(&disk->quiescing, true);
    unsigned old = (unsigned)(atomic_fetch_add(&disk->epoch, 1) & 1);
    pthread_mutex_lock(&disk->drain_lock);
    while (atomic_load(&disk->running[old]) != 0) {
        pthread_cond_wait(&disk->drained, &disk->drain_lock);
    }
    pthread_mutex_unlock(&disk->drain_lock);
    atomic_store(&disk->quiescing, false);
    /* What was freed may be used again from now on, also by another payload of the same length. */
    codec_drop_layer(&disk->codec, 0);
    pthread_mutex_unlock(&disk->quiesce_lock);
}

int request_fail(struct request *request, int error, const char *operation, uint32_t layer, uint32_t file,
                 uint64_t offset)
{
    *request->outcome = (tapfs_outcome){
        .status = TAPFS_FAILED,
        .error = error,
        .layer = layer,
        .file = file,
        .offset = offset,
        .operation = operation,
    };
    return -1;
}

int request_host_error(struct request *request, int error, const char *operation, uint32_t layer, uint32_t file,
                       uint64_t offset, uint64_t length)
{
    if (error != ENODATA) {
        return request_fail(request, error, operation, layer, file, offset);
    }
    *request->outcome =
        (tapfs_outcome){.status = TAPFS_FETCH, .layer = layer, .file = file, .offset = offset, .length = length};
    return -1;
}

int request_stop(struct request *request, int32_t status, uint32_t layer, uint64_t offset, uint64_t length)
{
    *request->outcome = (tapfs_outcome){.status = status, .layer = layer, .offset = offset, .length = length};
    probe_stop(status, layer, offset, length);
    return -1;
}

int request_again(struct request *request, int error)
{
    *request->outcome = (tapfs_outcome){.status = TAPFS_AGAIN, .error = error};
    return -1;
}

struct layer *writable_layer(struct request *request)
{
    struct layer *layer = disk_layer(request->disk, 0);
    if (layer == NULL || !layer->geometry.writable) {
        request_fail(request, EROFS, "write", 0, 0, 0);
        return NULL;
    }
    return layer;
}
