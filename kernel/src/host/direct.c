/* O_DIRECT: aligned transfers, bounce buffers, read-modify-write of edges, and the way back to
 * buffered I/O where the host refuses. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host/host.h"

static bool is_aligned(const struct host_file *file, const void *buffer, uint64_t offset, uint64_t length)
{
    return (uintptr_t)buffer % file->memory_alignment == 0 && (offset | length) % file->direct_block == 0;
}

static int set_direct(const struct host_file *file, bool on)
{
    int flags = fcntl(file->fd, F_GETFL);
    if (flags < 0) {
        return errno;
    }
    return fcntl(file->fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) < 0 ? errno : 0;
}

/*
 * The host refused an aligned transfer: no O_DIRECT on this file any more. Whoever was refused comes here and tries
 * once more, also when another thread has been here meanwhile: what begins after this is buffered.
 */
static int fall_back(struct host_file *file)
{
    pthread_mutex_lock(&file->direct_lock);
    int error = atomic_load(&file->direct) ? set_direct(file, false) : 0;
    if (error == 0) {
        atomic_store(&file->direct, false);
    }
    pthread_mutex_unlock(&file->direct_lock);
    return error;
}

/* pread, buffered from the first refusal on. The bytes, or a negated errno. */
static ssize_t direct_pread(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    bool refused = false;
    for (;;) {
        ssize_t count = pread(file->fd, buffer, length, (off_t)offset);
        if (count >= 0) {
            return count;
        }
        if (errno == EINTR) {
            continue;
        }
        if (errno != EINVAL || refused) {
            return -errno;
        }
        refused = true;
        int error = fall_back(file);
        if (error != 0) {
            return -error;
        }
    }
}

/*
 * An aligned transfer into an aligned buffer, up to the end of the file. A read that ends inside a block has met the
 * end, unless others have made the file longer since, or the transfer has broken off: then it goes on from the last
 * whole block. The size is believed only for reads that begin after it was seen.
 */
static int aligned_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length, uint64_t *got)
{
    uint64_t size = 0;
    for (*got = 0; *got < length;) {
        uint64_t before = *got, size_before = size;
        ssize_t count = direct_pread(file, buffer + *got, offset + *got, length - *got);
        if (count < 0) {
            return (int)-count;
        }
        *got += (uint64_t)count;
        if (count == 0 || *got == length) {
            break;
        }
        if (*got % file->direct_block != 0) {
            int error = host_size(file, &size);
            if (error != 0 || offset + *got >= size) {
                return error;
            }
            if (round_down(*got, file->direct_block) == before && offset + *got < size_before) {
                return EIO;
            }
            *got = round_down(*got, file->direct_block);
        }
    }
    return 0;
}

static int aligned_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length)
{
    int error = buffered_write(file, buffer, offset, length);
    if (error == EINVAL) {
        error = fall_back(file);
        if (error == 0) {
            error = buffered_write(file, buffer, offset, length);
        }
    }
    return error;
}

/* Whole blocks cannot end where the file does: write these bytes past the alignment rule. A transfer
 * that runs in the meantime is buffered, which is as right. */
static int unaligned_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length)
{
    pthread_mutex_lock(&file->direct_lock);
    int error = atomic_load(&file->direct) ? set_direct(file, false) : 0;
    if (error == 0) {
        error = buffered_write(file, buffer, offset, length);
        if (atomic_load(&file->direct) && set_direct(file, true) != 0) {
            /* A host that has changed its mind: the bytes are written all the same. */
            atomic_store(&file->direct, false);
        }
    }
    pthread_mutex_unlock(&file->direct_lock);
    return error;
}

static uint8_t *bounce_new(const struct host_file *file, uint64_t start, uint64_t end, uint64_t *size)
{
    *size = minimum(end - start, CHUNK_BYTES);
    return aligned_alloc(file->direct_block, *size);
}

int direct_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length, uint64_t *got)
{
    if (is_aligned(file, buffer, offset, length)) {
        return aligned_read(file, buffer, offset, length, got);
    }
    uint64_t position = offset, end = offset + length, size = 0;
    uint64_t last = round_up(end, file->direct_block);
    uint8_t *bounce = bounce_new(file, round_down(offset, file->direct_block), last, &size);
    int error = 0;

    if (bounce == NULL) {
        return ENOMEM;
    }
    while (position < end) {
        uint64_t start = round_down(position, file->direct_block), count = 0;
        uint64_t wanted = minimum(last - start, size);
        error = aligned_read(file, bounce, start, wanted, &count);
        if (error != 0 || start + count <= position) {
            break;
        }
        uint64_t part = minimum(start + count, end) - position;
        memcpy(buffer + (position - offset), bounce + (position - start), part);
        position += part;
        if (count < wanted) {
            break;
        }
    }
    free(bounce);
    *got = position - offset;
    return error;
}

/* A block that is about to be modified; what lies past the end of the file is zeros. */
static int read_block(struct host_file *file, uint8_t *block, uint64_t offset)
{
    uint64_t got = 0;
    int error = aligned_read(file, block, offset, file->direct_block, &got);
    if (error == 0) {
        memset(block + got, 0, file->direct_block - got);
    }
    return error;
}

/* Write [position, stop) through the bounce buffer as the whole blocks [start, aligned_stop). */
static int modify(struct host_file *file, uint8_t *bounce, const uint8_t *data, uint64_t position, uint64_t stop)
{
    uint64_t start = round_down(position, file->direct_block);
    uint64_t aligned_stop = round_up(stop, file->direct_block);
    uint64_t last = aligned_stop - file->direct_block;
    int error = 0;

    if (position > start) {
        error = read_block(file, bounce, start);
    }
    if (error == 0 && stop < aligned_stop && (last > start || position == start)) {
        error = read_block(file, bounce + (last - start), last);
    }
    if (error != 0) {
        return error;
    }
    memcpy(bounce + (position - start), data, stop - position);
    return aligned_write(file, bounce, start, aligned_stop - start);
}

int direct_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length)
{
    if (is_aligned(file, buffer, offset, length)) {
        return aligned_write(file, buffer, offset, length);
    }
    uint64_t position = offset, end = offset + length, size = 0, file_size = 0;
    uint64_t known = atomic_load(&file->known_size);
    uint8_t *bounce =
        bounce_new(file, round_down(offset, file->direct_block), round_up(end, file->direct_block), &size);
    int error = bounce == NULL ? ENOMEM : host_size(file, &file_size);

    if (error == 0) {
        /* What is read before it is modified must not be zeros for lost bytes. */
        error = host_judge_size(file, known, file_size);
    }
    while (error == 0 && position < end) {
        uint64_t start = round_down(position, file->direct_block);
        uint64_t stop = minimum(end, start + size);
        uint64_t last = round_down(stop, file->direct_block);
        const uint8_t *data = buffer + (position - offset);
        if (last < stop && last + file->direct_block > file_size) {
            /* Its last block would make the file longer than the bytes do. */
            if (last <= position) {
                error = unaligned_write(file, data, position, stop - position);
                position = stop;
                continue;
            }
            stop = last;
        }
        error = modify(file, bounce, data, position, stop);
        position = stop;
    }
    free(bounce);
    return error;
}
