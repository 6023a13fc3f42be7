/* Write in place, and write to the places that the driver has reserved. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define RUNS_AT_ONCE 24
/* Fills up to this many bytes travel with the data in one write. */
#define GATHERED_FILL_MAX (128u << 10)

static bool inside_disk(const struct layer *layer, uint64_t offset, uint64_t length)
{
    uint64_t size = layer->geometry.virtual_size;
    return offset <= size && length <= size - offset;
}

/* ---- in place */

struct in_place_write {
    struct request *request;
    const uint8_t *buffer;
    uint64_t offset;
    tapfs_extent pending; /* runs that are contiguous on the host; none while length is 0 */
    uint64_t gap;         /* where the run begins that needs a reservation; UINT64_MAX: not met */
};

static int write_pending(struct in_place_write *write)
{
    tapfs_extent *pending = &write->pending;
    if (pending->length == 0) {
        return 0;
    }
    if (layer_write(write->request, pending->file, pending->host_offset, pending->offset,
                    write->buffer + (pending->offset - write->offset), pending->length) != 0) {
        return -1;
    }
    write->request->position = pending->offset + pending->length;
    pending->length = 0;
    return 0;
}

/* 1: go on; 0: what needs a reservation ends here; -1: failed. */
static int take_run(struct in_place_write *write, const tapfs_extent *run)
{
    tapfs_extent *pending = &write->pending;

    if (run->kind != TAPFS_DATA || !run->in_place) {
        if (write->gap == UINT64_MAX) {
            write->gap = run->offset;
        }
        return 1;
    }
    if (write->gap != UINT64_MAX) {
        return 0;
    }
    if (pending->length > 0 && pending->file == run->file &&
        pending->host_offset + pending->length == run->host_offset) {
        pending->length += run->length;
        return 1;
    }
    if (write_pending(write) != 0) {
        return -1;
    }
    *pending = *run;
    return 1;
}

static int write_mapped(struct in_place_write *write, uint64_t end)
{
    struct request *request = write->request;
    tapfs_extent runs[RUNS_AT_ONCE];
    uint64_t at = write->offset;
    int found = MAP_FOUND;

    for (int go_on = 1; at < end && go_on == 1;) {
        size_t count = 0;
        found = map_lookup(request->disk, 0, at, end - at, request->nowait, runs, RUNS_AT_ONCE, &count);
        if (found != MAP_FOUND) {
            break;
        }
        for (size_t i = 0; i < count && go_on == 1; i++) {
            go_on = take_run(write, &runs[i]);
            if (go_on < 0) {
                return -1;
            }
            at = go_on == 1 ? runs[i].offset + runs[i].length : at;
        }
    }
    if (write_pending(write) != 0) {
        return -1;
    }
    if (write->gap != UINT64_MAX) {
        return request_stop(request, TAPFS_RESERVE, 0, write->gap, at - write->gap);
    }
    if (found == MAP_WOULD_BLOCK) {
        return request_again(request, EAGAIN);
    }
    return found == MAP_FOUND ? 0 : request_stop(request, TAPFS_MISS, 0, at, end - at);
}

void tapfs_write(tapfs_disk *disk, const void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                 tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    request.position = offset;
    request.nowait = (flags & TAPFS_NOWAIT) != 0;
    const struct layer *layer = writable_layer(&request);

    if (layer == NULL) {
        /* writable_layer has said it */
    } else if (!inside_disk(layer, offset, length)) {
        request_fail(&request, ERANGE, "write", 0, 0, offset);
    } else if (length > 0 && atomic_load(&disk->sealed)) {
        request_stop(&request, TAPFS_RESERVE, 0, offset, length);
    } else if (layer->geometry.identity) {
        if (layer->geometry.identity_file >= layer->file_count) {
            request_fail(&request, EBADF, "write", 0, 0, offset);
        } else if (length > 0 && layer_write(&request, layer->geometry.identity_file,
                                             layer->geometry.identity_offset + offset, offset, buffer, length) == 0) {
            request.position = offset + length;
        }
    } else {
        struct in_place_write write = {.request = &request, .buffer = buffer, .offset = offset, .gap = UINT64_MAX};
        write_mapped(&write, offset + length);
    }
    outcome->done = request.position - offset;
    atomic_fetch_add(&disk->bytes_written, outcome->done);
    request_end(&request);
}

/* ---- reserved */

static bool placement_valid(const struct layer *layer, const tapfs_placement *placement)
{
    return placement->length > 0 && placement->file < layer->file_count &&
           in_host_range(placement->offset, placement->length) &&
           in_host_range(placement->host_offset, placement->length) &&
           (layer->cipher == NULL || placement->offset % layer->geometry.cipher.sector_bytes == 0);
}

static bool placements_cover(const struct layer *layer, const tapfs_placement *placements, size_t count,
                             uint64_t offset, uint64_t length)
{
    if (count == 0) {
        return length == 0;
    }
    uint64_t end = placements[0].offset;
    for (size_t i = 0; i < count; i++) {
        if (!placement_valid(layer, &placements[i]) || placements[i].offset != end) {
            return false;
        }
        end += placements[i].length;
    }
    return placements[0].offset <= offset && length <= end - offset;
}

/* The part of the request that one placement takes: [start, stop) of the disk. */
struct piece {
    struct request *request;
    const tapfs_placement *place;
    const uint8_t *data; /* of `start` */
    uint64_t start, stop;
};

/* The old contents of the disk, read like any reader would. */
static int read_fill(const struct piece *piece, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    return length == 0 ? 0 : layer_read(piece->request, 0, buffer, offset, length);
}

static bool may_skip_zeros(const struct piece *piece)
{
    return piece->place->fresh && piece->request->disk->layers[0]->cipher == NULL;
}

/* Head fill, data and tail fill in one vector. */
static int write_gathered(const struct piece *piece, uint64_t head, uint64_t tail)
{
    const tapfs_placement *place = piece->place;
    struct request *request = piece->request;
    uint8_t *fill = malloc(head + tail);
    int result = 0;

    if (fill == NULL) {
        return request_fail(request, ENOMEM, "write", 0, place->file, place->host_offset);
    }
    if (read_fill(piece, fill, place->offset, head) != 0 || read_fill(piece, fill + head, piece->stop, tail) != 0) {
        free(fill);
        return -1;
    }
    bool put_head = head > 0 && !(may_skip_zeros(piece) && tapfs_is_zero(fill, head));
    bool put_tail = tail > 0 && !(may_skip_zeros(piece) && tapfs_is_zero(fill + head, tail));
    struct iovec vector[3];
    int count = 0;
    if (put_head) {
        vector[count++] = (struct iovec){.iov_base = fill, .iov_len = head};
    }
    /* struct iovec serves readers too, hence not const. */
    vector[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)piece->data, .iov_len = piece->stop - piece->start};
    if (put_tail) {
        vector[count++] = (struct iovec){.iov_base = fill + head, .iov_len = tail};
    }
    uint64_t host = place->host_offset + (put_head ? 0 : head);
    int error = host_write_vector(request->disk->layers[0]->files[place->file], vector, count, host);
    if (error != 0) {
        result = request_fail(request, error, "write", 0, place->file, host);
    }
    free(fill);
    return result;
}

/* The placement in bounce buffers: long fills, the cipher, O_DIRECT. */
static int write_bounced(const struct piece *piece)
{
    const tapfs_placement *place = piece->place;
    struct request *request = piece->request;
    uint64_t end = place->offset + place->length;
    uint8_t *bounce =
        aligned_alloc(DIRECT_ALIGNMENT, round_up(minimum(place->length, CHUNK_BYTES), DIRECT_ALIGNMENT));
    int result = 0;

    if (bounce == NULL) {
        return request_fail(request, ENOMEM, "write", 0, place->file, place->host_offset);
    }
    for (uint64_t at = place->offset; at < end && result == 0; at += CHUNK_BYTES) {
        uint64_t stop = minimum(end, at + CHUNK_BYTES);
        uint64_t data_start = minimum(maximum(at, piece->start), stop);
        uint64_t data_stop = maximum(minimum(stop, piece->stop), data_start);
        result = read_fill(piece, bounce, at, data_start - at);
        if (result == 0) {
            result = read_fill(piece, bounce + (data_stop - at), data_stop, stop - data_stop);
        }
        if (result != 0) {
            break;
        }
        if (data_start < data_stop) {
            memcpy(bounce + (data_start - at), piece->data + (data_start - piece->start), data_stop - data_start);
        } else if (may_skip_zeros(piece) && tapfs_is_zero(bounce, stop - at)) {
            continue;
        }
        result = layer_write(request, place->file, place->host_offset + (at - place->offset), at, bounce, stop - at);
    }
    free(bounce);
    return result;
}

static int write_piece(const struct piece *piece)
{
    const tapfs_placement *place = piece->place;
    const struct layer *layer = piece->request->disk->layers[0];
    uint64_t head = piece->start - place->offset;
    uint64_t tail = place->offset + place->length - piece->stop;

    if (place->in_place || head + tail == 0) {
        return layer_write(piece->request, place->file, place->host_offset + head, piece->start, piece->data,
                           piece->stop - piece->start);
    }
    if (layer->cipher == NULL && !layer->files[place->file]->ranged && head + tail <= GATHERED_FILL_MAX) {
        return write_gathered(piece, head, tail);
    }
    return write_bounced(piece);
}

void tapfs_write_reserved(tapfs_disk *disk, const void *buffer, uint64_t offset, uint64_t length,
                          const tapfs_placement *placements, size_t count, tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    const struct layer *layer = writable_layer(&request);

    if (layer == NULL) {
        /* writable_layer has said it */
    } else if (!inside_disk(layer, offset, length)) {
        request_fail(&request, ERANGE, "write", 0, 0, offset);
    } else if (!placements_cover(layer, placements, count, offset, length)) {
        request_fail(&request, EINVAL, "write", 0, 0, offset);
    } else {
        int result = 0;
        for (size_t i = 0; i < count && result == 0; i++) {
            const tapfs_placement *place = &placements[i];
            uint64_t start = minimum(maximum(place->offset, offset), place->offset + place->length);
            uint64_t stop = maximum(minimum(place->offset + place->length, offset + length), start);
            const struct piece piece = {
                .request = &request,
                .place = place,
                .data = (const uint8_t *)buffer + (start - offset),
                .start = start,
                .stop = stop,
            };
            result = write_piece(&piece);
        }
    }
    outcome->done = outcome->status == TAPFS_DONE ? length : 0;
    atomic_fetch_add(&disk->bytes_written, outcome->done);
    request_end(&request);
}

void tapfs_zero_placements(tapfs_disk *disk, const tapfs_placement *placements, size_t count, int discard,
                           tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    const struct layer *layer = writable_layer(&request);
    int result = layer == NULL ? -1 : 0;

    for (size_t i = 0; i < count && result == 0; i++) {
        result = placement_valid(layer, &placements[i])
                     ? layer_zero(&request, &placements[i], discard != 0)
                     : request_fail(&request, EINVAL, "write zeros", 0, 0, placements[i].host_offset);
    }
    request_end(&request);
}
