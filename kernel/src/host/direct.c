/* O_DIRECT: aligned transfers, bounce buffers, read-modify-write of edges, and the way back to
 * buffered I/O where the host refuses. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/internal.h"

static bool is_aligned(const void *buffer, uint64_t offset, uint64_t length)
{
    return (((uintptr_t)buffer | offset | length) % DIRECT_ALIGNMENT) == 0;
}

static int set_direct(const struct host_file *file, bool on)
{
    int flags = fcntl(file->fd, F_GETFL);
    if (flags < 0) {
        return errno;
    }
    return fcntl(file->fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) < 0 ? errno : 0;
}

/* The host refused an aligned transfer: no O_DIRECT on this file any more. */
static int fall_back(struct host_file *file)
{
    pthread_mutex_lock(&file->direct_lock);
    int error = set_direct(file, false);
    if (error == 0) {
        atomic_store(&file->direct, false);
    }
    pthread_mutex_unlock(&file->direct_lock);
    return error;
}

/* An aligned transfer into or out of an aligned buffer. Reading stops at the end of the file. */
static int aligned_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length, uint64_t *got)
{
    for (*got = 0; *got < length;) {
        ssize_t count = pread(file->fd, buffer + *got, length - *got, (off_t)(offset + *got));
        if (count < 0) {
            if (errno == EINTR) {
                continue;
            }
            if (errno != EINVAL || !atomic_load(&file->direct)) {
                return errno;
            }
            int error = fall_back(file);
            if (error != 0) {
                return error;
            }
            continue;
        }
        uint64_t before = *got, size = 0;
        *got += (uint64_t)count;
        if (count == 0 || *got == length) {
            break;
        }
        if (*got % DIRECT_ALIGNMENT != 0) {
            /* The end of the file, or a transfer that broke off: again from the last whole block. */
            int error = host_size(file, &size);
            if (error != 0 || offset + *got >= size) {
                return error;
            }
            *got = round_down(*got, DIRECT_ALIGNMENT);
            if (*got == before) {
                return EIO;
            }
        }
    }
    return 0;
}

static int aligned_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length)
{
    int error = buffered_write(file, buffer, offset, length);
    if (error == EINVAL && atomic_load(&file->direct)) {
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
    int error = set_direct(file, false);
    if (error == 0) {
        error = buffered_write(file, buffer, offset, length);
        if (atomic_load(&file->direct)) {
            int back = set_direct(file, true);
            error = error != 0 ? error : back;
        }
    }
    pthread_mutex_unlock(&file->direct_lock);
    return error;
}

static uint8_t *bounce_new(uint64_t start, uint64_t end, uint64_t *size)
{
    *size = minimum(end - start, CHUNK_BYTES);
    return aligned_alloc(DIRECT_ALIGNMENT, *size);
}

int direct_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length, uint64_t *got)
{
    if (is_aligned(buffer, offset, length)) {
        return aligned_read(file, buffer, offset, length, got);
    }
    uint64_t position = offset, end = offset + length, size = 0;
    uint64_t last = round_up(end, DIRECT_ALIGNMENT);
    uint8_t *bounce = bounce_new(round_down(offset, DIRECT_ALIGNMENT), last, &size);
    int error = 0;

    if (bounce == NULL) {
        return ENOMEM;
    }
    while (position < end) {
        uint64_t start = round_down(position, DIRECT_ALIGNMENT), count = 0;
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
    int error = aligned_read(file, block, offset, DIRECT_ALIGNMENT, &got);
    if (error == 0) {
        memset(block + got, 0, DIRECT_ALIGNMENT - got);
    }
    return error;
}

/* Write [position, stop) through the bounce buffer as the whole blocks [start, aligned_stop). */
static int modify(struct host_file *file, uint8_t *bounce, const uint8_t *data, uint64_t position, uint64_t stop)
{
    uint64_t start = round_down(position, DIRECT_ALIGNMENT);
    uint64_t aligned_stop = round_up(stop, DIRECT_ALIGNMENT);
    uint64_t last = aligned_stop - DIRECT_ALIGNMENT;
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
    if (is_aligned(buffer, offset, length)) {
        return aligned_write(file, buffer, offset, length);
    }
    uint64_t position = offset, end = offset + length, size = 0, file_size = 0;
    uint8_t *bounce = bounce_new(round_down(offset, DIRECT_ALIGNMENT), round_up(end, DIRECT_ALIGNMENT), &size);
    int error = bounce == NULL ? ENOMEM : host_size(file, &file_size);

    while (error == 0 && position < end) {
        uint64_t start = round_down(position, DIRECT_ALIGNMENT);
        uint64_t stop = minimum(end, start + size);
        uint64_t last = round_down(stop, DIRECT_ALIGNMENT);
        const uint8_t *data = buffer + (position - offset);
        if (last < stop && last + DIRECT_ALIGNMENT > file_size) {
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
