/* Write guest bytes to a host place of layer 0: encrypt them, and hold the range lock where a write must read first. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

/*
 * Only a write that modifies a sector or a block in memory can undo a neighbour's, so plain
 * buffered files need no lock at all.
 */
static bool lock_range(struct request *request, struct range_holder *holder, const struct layer *layer,
                       const struct host_file *file, uint64_t start, uint64_t end)
{
    if (!file->ranged && layer->cipher == NULL) {
        return false;
    }
    *holder = (struct range_holder){
        .object = file,
        .start = file->ranged ? round_down(start, file->direct_block) : start,
        .end = file->ranged ? round_up(end, file->direct_block) : end,
        .exclusive = true,
    };
    range_lock_acquire(&request->disk->ranges, holder, false);
    return true;
}

static void unlock_range(struct request *request, struct range_holder *holder, bool locked)
{
    if (locked) {
        range_lock_release(&request->disk->ranges, holder);
    }
}

int layer_write_plain(struct request *request, uint32_t file_index, uint64_t host, const uint8_t *buffer,
                      uint64_t length)
{
    const struct layer *layer = request->disk->layers[0];
    struct host_file *file = layer->files[file_index];
    struct range_holder holder;

    bool locked = lock_range(request, &holder, layer, file, host, host + length);
    int error = host_write(file, buffer, host, length);
    unlock_range(request, &holder, locked);
    return error == 0 ? 0 : request_fail(request, error, "write", 0, file_index, host);
}

/* A sector as it is on the host, of which a write covers only a part. */
struct kept_sector {
    uint64_t host, length; /* nothing was kept: 0 */
    uint8_t bytes[CIPHER_SECTOR_MAX];
};

/* The plain bytes of a sector that is about to be modified; zeros where the file has ended. */
static int load_sector(const struct layer *layer, struct host_file *file, uint8_t *sector, uint64_t host,
                       uint64_t guest, struct kept_sector *kept)
{
    uint32_t bytes = layer->geometry.cipher.sector_bytes;
    int error = host_read(file, kept->bytes, host, bytes, false, &kept->length);
    if (error != 0) {
        kept->length = 0;
        return error;
    }
    kept->host = host;
    memcpy(sector, kept->bytes, kept->length);
    memset(sector + kept->length, 0, bytes - kept->length);
    return kept->length == 0 ? 0 : cipher_apply(layer->cipher, false, sector, guest, host, bytes);
}

/*
 * The host may have taken a part of a sector before it failed, and a sector that is new in front and old behind decrypts
 * to garbage also where nobody wrote. What the host took once it takes again.
 */
static void put_back(struct host_file *file, const struct kept_sector *kept)
{
    if (kept->length > 0) {
        (void)host_write(file, kept->bytes, kept->host, kept->length);
    }
}

/* One bounce buffer of whole sectors [host, host + span), of which [from, to) is new. */
static int write_sectors(const struct layer *layer, struct host_file *file, uint8_t *bounce, uint64_t host,
                         uint64_t guest, uint64_t span, const uint8_t *data, uint64_t from, uint64_t to)
{
    uint64_t last = span - layer->geometry.cipher.sector_bytes;
    struct kept_sector first_kept, last_kept;
    int error = 0;

    first_kept.length = last_kept.length = 0;
    if (from > 0) {
        error = load_sector(layer, file, bounce, host, guest, &first_kept);
    }
    if (error == 0 && to < span && (last > 0 || from == 0)) {
        error = load_sector(layer, file, bounce + last, host + last, guest + last, &last_kept);
    }
    if (error != 0) {
        return error;
    }
    memcpy(bounce + from, data, to - from);
    error = cipher_apply(layer->cipher, true, bounce, guest, host, span);
    if (error == 0) {
        error = host_write(file, bounce, host, span);
        if (error != 0) {
            put_back(file, &first_kept);
            put_back(file, &last_kept);
        }
    }
    return error;
}

/* Without waiting: neither for the host nor for a range. */
static int write_at_once(struct request *request, uint32_t file_index, uint64_t host, const uint8_t *buffer,
                         uint64_t length)
{
    const struct layer *layer = request->disk->layers[0];
    struct host_file *file = layer->files[file_index];
    /* Under a cipher, and under O_DIRECT, a write may have to read first. */
    int error = layer->cipher != NULL || file->ranged ? EOPNOTSUPP : host_write_nowait(file, buffer, host, length);

    if (error == EAGAIN || error == EOPNOTSUPP) {
        return request_again(request, error);
    }
    return error == 0 ? 0 : request_fail(request, error, "write", 0, file_index, host);
}

int layer_write(struct request *request, uint32_t file_index, uint64_t host, uint64_t guest, const uint8_t *buffer,
                uint64_t length)
{
    const struct layer *layer = request->disk->layers[0];
    if (length == 0) {
        return 0; /* a direct write would look for the rest of its block, where the file may not have come to yet */
    }
    if (request->nowait) {
        return write_at_once(request, file_index, host, buffer, length);
    }
    if (layer->cipher == NULL) {
        return layer_write_plain(request, file_index, host, buffer, length);
    }
    struct host_file *file = layer->files[file_index];
    struct range_holder holder;
    uint64_t inner = guest % layer->geometry.cipher.sector_bytes;
    uint64_t span = round_up(inner + length, layer->geometry.cipher.sector_bytes);
    uint64_t start = host - inner, sector = guest - inner;
    uint8_t *bounce = aligned_alloc(DIRECT_ALIGNMENT, round_up(minimum(span, CHUNK_BYTES), DIRECT_ALIGNMENT));
    int error = bounce == NULL ? ENOMEM : 0;

    bool locked = lock_range(request, &holder, layer, file, start, start + span);
    for (uint64_t at = 0; at < span && error == 0; at += CHUNK_BYTES) {
        uint64_t part = minimum(span - at, CHUNK_BYTES);
        uint64_t from = maximum(at, inner), to = minimum(at + part, inner + length);
        error = write_sectors(layer, file, bounce, start + at, sector + at, part, buffer + (from - inner), from - at,
                              to - at);
    }
    unlock_range(request, &holder, locked);
    free(bounce);
    return error == 0 ? 0 : request_fail(request, error, "write", 0, file_index, host);
}

static int punch(struct request *request, uint32_t file_index, uint64_t host, uint64_t length)
{
    const struct layer *layer = request->disk->layers[0];
    struct host_file *file = layer->files[file_index];
    struct range_holder holder;

    bool locked = lock_range(request, &holder, layer, file, host, host + length);
    int error = host_punch(file, host, length);
    unlock_range(request, &holder, locked);
    return error;
}

void layer_discard(struct request *request, uint32_t file, uint64_t host, uint64_t length)
{
    /* Advisory: whatever the host says, the image is as good as before. */
    (void)punch(request, file, host, length);
}

int layer_zero(struct request *request, const tapfs_placement *placement, bool discard)
{
    const struct layer *layer = request->disk->layers[0];
    int result = 0;

    if (discard) {
        /* Under a cipher a hole reads as garbage, which would tell the guest nothing useful. */
        if (layer->cipher == NULL && !placement->fresh) {
            layer_discard(request, placement->file, placement->host_offset, placement->length);
        }
        return 0;
    }
    if (layer->cipher == NULL &&
        (placement->fresh || punch(request, placement->file, placement->host_offset, placement->length) == 0)) {
        return 0;
    }
    for (uint64_t done = 0; done < placement->length && result == 0; done += CHUNK_BYTES) {
        result = layer_write(request, placement->file, placement->host_offset + done, placement->offset + done,
                             zero_chunk, minimum(placement->length - done, CHUNK_BYTES));
    }
    return result;
}
