/* Read down the chain, layer by layer. */
#include <errno.h>
#include <string.h>

#include "engine/internal.h"

/* Runs that one lookup brings to the stack. */
#define RUNS_AT_ONCE 24

/* The bytes that a file has; past its end zeros, unless the layer is an identity. */
static int host_part(struct request *request, uint32_t index, uint32_t file_index, uint8_t *buffer, uint64_t host,
                     uint64_t length)
{
    const struct layer *layer = request->disk->layers[index];
    uint64_t got = 0;
    int error = host_read(layer->files[file_index], buffer, host, length, request->nowait, &got);

    if (request->nowait && (error == EAGAIN || error == EOPNOTSUPP)) {
        return request_again(request, error);
    }
    if (error == 0 && got < length && layer->geometry.identity) {
        error = EIO;
    }
    if (error != 0) {
        return request_host_error(request, error, "read", index, file_index, host + got, length - got);
    }
    memset(buffer + got, 0, length - got);
    return 0;
}

/* Whole sectors decrypt in the caller's buffer, the edges of a request on the stack. */
static int decrypted_part(struct request *request, uint32_t index, const tapfs_extent *run, uint8_t *buffer)
{
    const struct layer *layer = request->disk->layers[index];
    uint64_t end = run->offset + run->length, bytes = layer->geometry.cipher.sector_bytes;

    for (uint64_t at = run->offset; at < end;) {
        uint8_t sector[CIPHER_SECTOR_MAX];
        uint64_t inner = at % bytes;
        uint64_t host = run->host_offset + (at - run->offset);
        bool whole = inner == 0 && end - at >= bytes;
        uint64_t part = whole ? round_down(end - at, bytes) : minimum(end - at, bytes - inner);
        uint8_t *target = whole ? buffer + (at - run->offset) : sector;
        uint64_t span = whole ? part : bytes;

        if (host_part(request, index, run->file, target, host - inner, span) != 0) {
            return -1;
        }
        int error = cipher_apply(layer->cipher, false, target, at - inner, host - inner, span);
        if (error != 0) {
            return request_fail(request, error, "decrypt", index, run->file, host);
        }
        if (!whole) {
            memcpy(buffer + (at - run->offset), sector + inner, part);
        }
        at += part;
    }
    return 0;
}

static int data_read(struct request *request, uint32_t index, const tapfs_extent *run, uint8_t *buffer)
{
    const struct layer *layer = request->disk->layers[index];
    int result;

    if (layer->cipher == NULL) {
        result = host_part(request, index, run->file, buffer, run->host_offset, run->length);
    } else if (!layer->geometry.writable) {
        result = decrypted_part(request, index, run, buffer);
    } else {
        /* A sector that is half rewritten would decrypt to garbage where nobody wrote. */
        uint64_t inner = run->offset % layer->geometry.cipher.sector_bytes;
        uint64_t start = run->host_offset - inner;
        struct range_holder holder = {
            .object = layer->files[run->file],
            .start = start,
            .end = start + round_up(inner + run->length, layer->geometry.cipher.sector_bytes),
        };
        if (!range_lock_acquire(&request->disk->ranges, &holder, request->nowait)) {
            return request_again(request, EAGAIN);
        }
        result = decrypted_part(request, index, run, buffer);
        range_lock_release(&request->disk->ranges, &holder);
    }
    if (result == 0) {
        request->position = run->offset + run->length;
    }
    return result;
}

static int compressed_read(struct request *request, uint32_t index, const tapfs_extent *run, uint8_t *buffer)
{
    const struct layer *layer = request->disk->layers[index];
    bool own = layer->geometry.packing.own_units != 0;
    uint64_t unit = layer->geometry.packed_unit;
    uint64_t inner = own ? run->skip : run->offset % unit;
    struct codec_source source = {
        .file = layer->files[run->file],
        .layer_index = index,
        .file_index = run->file,
        .host_offset = run->host_offset,
        .host_length = run->host_length,
        .unit = unit,
        /* The last unit of a disk may hold only what the disk has of it. */
        .least = own ? inner + run->length : minimum(unit, layer->geometry.virtual_size - (run->offset - inner)),
        .packing = &layer->geometry.packing,
        .nowait = request->nowait,
    };
    int error = codec_read(&request->disk->codec, &source, buffer, inner, run->length);

    if (request->nowait && (error == EAGAIN || error == EOPNOTSUPP)) {
        return request_again(request, error);
    }
    if (error != 0) {
        return request_host_error(request, error, error == EUCLEAN ? "unpack" : "read", index, run->file,
                                  run->host_offset, run->host_length);
    }
    request->position = run->offset + run->length;
    return 0;
}

/* Whether a run continues the one before it, whose length is 0 if there is none. */
static bool continues(const tapfs_extent *pending, const tapfs_extent *run)
{
    return pending->length > 0 && pending->kind == run->kind &&
           (run->kind == TAPFS_UNALLOCATED ||
            (run->kind == TAPFS_DATA && pending->file == run->file &&
             pending->host_offset + pending->length == run->host_offset));
}

/* `buffer` stands at the start of the run. */
static int run_read(struct request *request, uint32_t index, const tapfs_extent *run, uint8_t *buffer)
{
    switch (run->kind) {
    case TAPFS_DATA:
        return data_read(request, index, run, buffer);
    case TAPFS_COMPRESSED:
        return compressed_read(request, index, run, buffer);
    case TAPFS_UNALLOCATED:
        return layer_read(request, index + 1, buffer, run->offset, run->length);
    default:
        memset(buffer, 0, run->length);
        request->position = run->offset + run->length;
        return 0;
    }
}

/* A read of which the runs come one after the other. A run waits in `pending` until one comes that does not continue it,
 * across map units too. */
struct reading {
    struct request *request;
    uint8_t *buffer;
    uint64_t offset; /* of the buffer's first byte */
    tapfs_extent pending;
    uint32_t layer; /* that gives `pending` */
};

static int read_pending(struct reading *reading)
{
    const tapfs_extent *pending = &reading->pending;
    if (pending->length == 0) {
        return 0;
    }
    int result = run_read(reading->request, reading->layer, pending, reading->buffer + (pending->offset - reading->offset));
    reading->pending.length = 0;
    return result;
}

static int take_run(struct reading *reading, uint32_t layer, const tapfs_extent *run)
{
    if (reading->layer == layer && continues(&reading->pending, run)) {
        reading->pending.length += run->length;
        return 0;
    }
    if (read_pending(reading) != 0) {
        return -1;
    }
    reading->pending = *run;
    reading->layer = layer;
    return 0;
}

static int mapped_read(struct request *request, uint32_t index, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    struct reading reading = {.request = request, .buffer = buffer, .offset = offset};
    tapfs_extent runs[RUNS_AT_ONCE];
    uint64_t end = offset + length, at = offset;
    int found = MAP_FOUND;

    while (at < end) {
        size_t count = 0;
        found = map_lookup(request->disk, index, at, end - at, request->nowait, runs, RUNS_AT_ONCE, &count);
        for (size_t i = 0; i < count; i++) {
            if (take_run(&reading, index, &runs[i]) != 0) {
                return -1;
            }
        }
        if (count == 0) {
            break;
        }
        at = runs[count - 1].offset + runs[count - 1].length;
    }
    if (read_pending(&reading) != 0) {
        return -1;
    }
    if (at < end && found == MAP_WOULD_BLOCK) {
        return request_again(request, EAGAIN);
    }
    return at == end ? 0 : request_stop(request, TAPFS_MISS, index, at, end - at);
}

/* The top layer, by merged maps where there are any: whichever layer a run comes from, it is found at once. */
static int chain_read(struct request *request, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    struct reading reading = {.request = request, .buffer = buffer, .offset = offset};
    tapfs_extent runs[RUNS_AT_ONCE];
    uint64_t end = offset + length;

    for (uint64_t at = offset, stop; at < end;) {
        size_t count = 0;
        if (merged_lookup(request->disk, at, end, true, request->nowait, runs, RUNS_AT_ONCE, &count, &stop) !=
            MAP_FOUND) {
            if (read_pending(&reading) != 0 ||
                mapped_read(request, 0, buffer + (at - offset), at, stop - at) != 0) {
                return -1;
            }
            at = stop;
            continue;
        }
        for (size_t i = 0; i < count; i++) {
            if (take_run(&reading, runs[i].depth, &runs[i]) != 0) {
                return -1;
            }
        }
        at = runs[count - 1].offset + runs[count - 1].length;
    }
    return read_pending(&reading);
}

int layer_read(struct request *request, uint32_t index, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    const struct layer *layer = disk_layer(request->disk, index);
    uint64_t size = layer == NULL ? 0 : layer->geometry.virtual_size;
    uint64_t inside = offset < size ? minimum(length, size - offset) : 0;

    if (inside > 0) {
        int result;
        if (layer->geometry.identity) {
            tapfs_extent whole = {
                .offset = offset,
                .length = inside,
                .host_offset = layer->geometry.identity_offset + offset,
                .file = layer->geometry.identity_file,
                .kind = TAPFS_DATA,
            };
            result = layer->geometry.identity_file >= layer->file_count ? request_fail(request, EBADF, "read", index, 0, offset)
                                            : data_read(request, index, &whole, buffer);
        } else {
            result = index == 0 ? chain_read(request, buffer, offset, inside)
                                : mapped_read(request, index, buffer, offset, inside);
        }
        if (result != 0) {
            return result;
        }
    }
    if (inside < length) {
        memset(buffer + inside, 0, length - inside);
        request->position = offset + length;
    }
    return 0;
}

void tapfs_read(tapfs_disk *disk, void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    request.position = offset;
    request.nowait = (flags & TAPFS_NOWAIT) != 0;
    const struct layer *top = disk_layer(disk, 0);
    uint64_t size = top == NULL ? 0 : top->geometry.virtual_size;

    if (offset > size || length > size - offset) {
        request_fail(&request, ERANGE, "read", 0, 0, offset);
    } else if (length > 0) {
        layer_read(&request, 0, buffer, offset, length);
    }
    outcome->done = request.position - offset;
    atomic_fetch_add(&disk->bytes_read, outcome->done);
    request_end(&request);
}
