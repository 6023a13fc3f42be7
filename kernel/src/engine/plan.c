/* Execute plans and make the files of layer 0 durable. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

/* So many bytes of tables take space by zeros that are written. */
#define ZEROS_MAX (16u << 10)

static int barrier(struct request *request)
{
    const struct layer *layer = request->disk->layers[0];
    TAPFS_PROBE2(flush__begin, request->disk, layer->file_count);
    /* Every file, also after a failure: what can be made durable is. */
    int result = 0;
    for (uint32_t i = 0; i < layer->file_count; i++) {
        int error = host_sync(layer->files[i]);
        if (error != 0 && result == 0) {
            result = request_fail(request, error, "sync", 0, i, 0);
        }
    }
    TAPFS_PROBE2(flush__end, request->disk, result != 0);
    return result;
}

/* A piece at a time; the two ranges do not overlap. What the file ends before is zeros. */
static int copy_range(struct request *request, const struct layer *layer, const tapfs_step *step)
{
    if (!in_host_range(step->source, step->length)) {
        return request_fail(request, EINVAL, "execute a plan", 0, step->file, step->source);
    }
    uint8_t *piece = malloc(CHUNK_BYTES);
    if (piece == NULL) {
        return request_fail(request, ENOMEM, "execute a plan", 0, step->file, step->source);
    }
    int result = 0;
    for (uint64_t done = 0; done < step->length && result == 0; done += CHUNK_BYTES) {
        uint64_t left = step->length - done, length = left < CHUNK_BYTES ? left : CHUNK_BYTES, got = 0;
        int error = host_read(layer->files[step->file], piece, step->source + done, length, false, &got);
        if (error != 0) {
            result = request_fail(request, error, "read", 0, step->file, step->source + done);
        } else {
            memset(piece + got, 0, length - got);
            result = layer_write_plain(request, step->file, step->host_offset + done, piece, length);
        }
    }
    free(piece);
    return result;
}

static int run_step(struct request *request, const struct layer *layer, const tapfs_step *step)
{
    if (step->step == TAPFS_STEP_BARRIER) {
        return barrier(request);
    }
    if (step->file >= layer->file_count || !in_host_range(step->host_offset, step->length)) {
        return request_fail(request, EINVAL, "execute a plan", 0, 0, step->host_offset);
    }
    switch (step->step) {
    case TAPFS_STEP_WRITE:
        return layer_write_plain(request, step->file, step->host_offset, step->data, step->length);
    case TAPFS_STEP_GROW: {
        int error = host_grow(layer->files[step->file], step->host_offset);
        return error == 0 ? 0 : request_fail(request, error, "grow", 0, step->file, step->host_offset);
    }
    case TAPFS_STEP_ALLOCATE: {
        int error = host_allocate(layer->files[step->file], step->host_offset, step->length);
        return error == 0 ? 0 : request_fail(request, error, "allocate", 0, step->file, step->host_offset);
    }
    case TAPFS_STEP_COPY:
        return copy_range(request, layer, step);
    case TAPFS_STEP_SHORTEN: {
        int error = host_shorten(layer->files[step->file], step->host_offset);
        return error == 0 ? 0 : request_fail(request, error, "shorten", 0, step->file, step->host_offset);
    }
    case TAPFS_STEP_DISCARD:
        layer_discard(request, step->file, step->host_offset, step->length);
        return 0;
    default:
        return request_fail(request, EINVAL, "execute a plan", 0, step->file, step->host_offset);
    }
}

/* A plan holds no map and may wait long for the disk, so quiesce does not wait for it. */
void tapfs_execute(tapfs_disk *disk, const tapfs_step *steps, size_t count, tapfs_outcome *outcome)
{
    *outcome = (tapfs_outcome){.status = TAPFS_DONE};
    struct request request = {.disk = disk, .outcome = outcome};
    const struct layer *layer = writable_layer(&request);
    int result = layer == NULL ? -1 : 0;

    for (size_t i = 0; i < count && result == 0; i++) {
        result = run_step(&request, layer, &steps[i]);
    }
}

void tapfs_sync(tapfs_disk *disk, tapfs_outcome *outcome)
{
    *outcome = (tapfs_outcome){.status = TAPFS_DONE};
    struct request request = {.disk = disk, .outcome = outcome};
    if (disk_layer(disk, 0) != NULL) {
        (void)barrier(&request);
    }
}

/*
 * Zeros in the page cache take space like all data that waits there, in a fifth of the time of fallocate on ext4. The
 * plan writes the same pages again, before they go to the disk.
 */
static int take_space(struct host_file *file, const tapfs_space *space)
{
    if (space->unused && space->length <= ZEROS_MAX && !file->ranged) {
        return host_write(file, zero_chunk, space->host_offset, space->length);
    }
    return atomic_load(&file->refuses_allocate) ? 0 : host_allocate(file, space->host_offset, space->length);
}

/* It holds no map, so quiesce does not wait for it. */
void tapfs_take_space(tapfs_disk *disk, const tapfs_space *spaces, size_t count, tapfs_outcome *outcome)
{
    *outcome = (tapfs_outcome){.status = TAPFS_DONE};
    struct request request = {.disk = disk, .outcome = outcome};
    const struct layer *layer = writable_layer(&request);
    int result = layer == NULL ? -1 : 0;

    for (size_t i = 0; i < count && result == 0; i++) {
        const tapfs_space *space = &spaces[i];
        if (space->file >= layer->file_count || !in_host_range(space->host_offset, space->length)) {
            result = request_fail(&request, EINVAL, "take space", 0, 0, space->host_offset);
            continue;
        }
        struct host_file *file = layer->files[space->file];
        int error = take_space(file, space);
        if (error == EOPNOTSUPP || error == ENOSYS) {
            atomic_store(&file->refuses_allocate, true);
        } else if (error != 0) {
            result = request_fail(&request, error, "take space", 0, space->file, space->host_offset);
        }
    }
}

void tapfs_start_writeback(tapfs_disk *disk)
{
    const struct layer *layer = disk_layer(disk, 0);
    for (uint32_t i = 0; layer != NULL && i < layer->file_count; i++) {
        host_start_writeback(layer->files[i], 0, 0);
    }
}

void tapfs_start_writeback_of(tapfs_disk *disk, uint64_t offset, uint64_t length)
{
    const struct layer *layer = disk_layer(disk, 0);
    if (layer != NULL && length > 0 && layer->geometry.identity && layer->geometry.identity_file < layer->file_count) {
        host_start_writeback(layer->files[layer->geometry.identity_file], layer->geometry.identity_offset + offset,
                             length);
    }
}

void tapfs_write_host(tapfs_disk *disk, uint32_t file, uint64_t host_offset, const void *buffer, uint64_t length,
                      uint64_t guest_offset, tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    const struct layer *layer = writable_layer(&request);

    if (layer == NULL) {
        /* writable_layer has said it */
    } else if (file >= layer->file_count || !in_host_range(host_offset, length)) {
        request_fail(&request, EINVAL, "write", 0, 0, host_offset);
    } else if (guest_offset == UINT64_MAX || layer->cipher == NULL) {
        layer_write_plain(&request, file, host_offset, buffer, length);
    } else if (guest_offset % layer->geometry.cipher.sector_bytes != 0 || !in_host_range(guest_offset, length)) {
        request_fail(&request, EINVAL, "write", 0, file, host_offset);
    } else {
        layer_write(&request, file, host_offset, guest_offset, buffer, length);
    }
    request_end(&request);
}
