/* Host files: complete reads and writes, growth, holes and durability. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "host/host.h"

/* The headers of Linux before 6.6 lack it. */
#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546
#endif

const uint8_t zero_chunk[CHUNK_BYTES] __attribute__((aligned(DIRECT_ALIGNMENT))) = {0};

/* What kind of host it is, and what is known of it from the start. */
static void ask_kind(struct host_file *file)
{
    struct statfs status;
    bool known = fstatfs(file->fd, &status) == 0;
    bool refuses_nowait = known && status.f_type == FUSE_SUPER_MAGIC;

    file->in_memory = known && (status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC);
    atomic_init(&file->refuses_nowait[0], refuses_nowait);
    atomic_init(&file->refuses_nowait[1], refuses_nowait);
    atomic_init(&file->refuses_allocate, false);
}

static bool is_block_size(uint64_t size)
{
    return size > 0 && (size & (size - 1)) == 0 && size <= CHUNK_BYTES;
}

/* Linux before 6.1 and some file systems do not say: then DIRECT_ALIGNMENT, and on a device its logical block. */
static void ask_alignment(struct host_file *file)
{
    int logical = 0;

    file->memory_alignment = file->offset_alignment = DIRECT_ALIGNMENT;
    if (file->block_device && ioctl(file->fd, BLKSSZGET, &logical) == 0 && logical > (int)DIRECT_ALIGNMENT &&
        is_block_size((uint64_t)logical)) {
        file->memory_alignment = file->offset_alignment = (uint32_t)logical;
    }
#ifdef STATX_DIOALIGN
    struct statx status;
    if (statx(file->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
        (status.stx_mask & STATX_DIOALIGN) != 0 && is_block_size(status.stx_dio_mem_align) &&
        is_block_size(status.stx_dio_offset_align)) {
        file->memory_alignment = status.stx_dio_mem_align;
        file->offset_alignment = status.stx_dio_offset_align;
    }
#endif
    file->direct_block =
        (uint32_t)maximum(DIRECT_ALIGNMENT, maximum(file->memory_alignment, file->offset_alignment));
}

int host_file_new(int fd, bool direct, bool writable, struct host_file **result)
{
    struct stat status;
    uint64_t size = 0;
    struct host_file *file;

    if (fstat(fd, &status) < 0) {
        return errno;
    }
    file = calloc(1, sizeof *file);
    if (file == NULL) {
        return ENOMEM;
    }
    file->fd = fd;
    file->window = UINT64_MAX;
    file->writable = writable;
    file->block_device = S_ISBLK(status.st_mode);
    file->ranged = direct;
    file->sparse = S_ISREG(status.st_mode) && (uint64_t)status.st_blocks * 512 < (uint64_t)status.st_size;
    ask_kind(file);
    ask_alignment(file);
    int error = host_size(file, &size);
    if (error != 0) {
        free(file);
        return error;
    }
    atomic_init(&file->direct, file->ranged);
    /* Whoever made the file may have written to it, so the first barrier always syncs. */
    atomic_init(&file->dirty, file->writable);
    /* A block device has its size: no write extends it. */
    atomic_init(&file->known_size, file->block_device ? UINT64_MAX : size);
    atomic_init(&file->cut_at, UINT64_MAX);
    atomic_init(&file->mapping, NULL);
    pthread_rwlock_init(&file->extend_lock, NULL);
    pthread_mutex_init(&file->sync_lock, NULL);
    pthread_mutex_init(&file->direct_lock, NULL);
    *result = file;
    return 0;
}

void host_file_free(struct host_file *file)
{
    host_unmap(file);
    pthread_mutex_destroy(&file->direct_lock);
    pthread_mutex_destroy(&file->sync_lock);
    pthread_rwlock_destroy(&file->extend_lock);
    free(file);
}

int host_file_set_window(struct host_file *file, uint64_t start, uint64_t length)
{
    if (file->writable || file->ranged || start > INT64_MAX || length > INT64_MAX - start) {
        return EINVAL;
    }
    file->start = start;
    file->window = length;
    /* What is behind the window is no end that a cut would move. */
    atomic_store(&file->known_size, length);
    return 0;
}

bool host_leaves_window(const struct host_file *file, uint64_t offset, uint64_t length)
{
    return offset > file->window || length > file->window - offset;
}

int host_read(struct host_file *file, void *buffer, uint64_t offset, uint64_t length, bool nowait, uint64_t *got)
{
    uint64_t known = atomic_load(&file->known_size), cut = atomic_load(&file->cut_at);
    uint64_t there = offset < file->window ? minimum(length, file->window - offset) : 0;
    uint64_t wanted = offset < cut ? minimum(there, cut - offset) : 0;
    int error;

    *got = 0;
    length = there; /* behind the window is the end of the file, whatever the descriptor has there */
    if (host_absent(file, offset, length)) {
        return ENODATA;
    }
    if (wanted == 0) {
        return length > 0 ? HOST_CUT : 0;
    }
    if (atomic_load(&file->direct)) {
        error = nowait ? EOPNOTSUPP : direct_read(file, buffer, offset, wanted, got);
    } else if (nowait && !file->in_memory) {
        error = nowait_read(file, buffer, offset, wanted, got);
    } else {
        error = buffered_read(file, buffer, offset, wanted, got);
    }
    if (error != 0 || *got == length) {
        return error;
    }
    if (wanted < length) {
        return HOST_CUT;
    }
    return !file->block_device && offset + *got < known ? host_judge_size(file, known, offset + *got) : 0;
}

/*
 * Writes that may extend the file hold extend_lock shared, host_grow holds it alone: between its
 * fstat and its ftruncate no write can make the file longer than it is about to become, so
 * ftruncate never cuts. Writes inside known_size need no lock.
 */
static bool write_begin(struct host_file *file, uint64_t end)
{
    if (end <= atomic_load(&file->known_size)) {
        return false;
    }
    pthread_rwlock_rdlock(&file->extend_lock);
    return true;
}

/* After the write, not before it: a sync that clears the flag while the write is on its way would otherwise
 * leave it unsynced and clean. Also after a failed one, which may have written a part. */
void host_wrote(struct host_file *file)
{
    if (!atomic_load(&file->dirty)) {
        atomic_store(&file->dirty, true);
    }
}

static void write_end(struct host_file *file, uint64_t end, bool extending, int error)
{
    host_wrote(file);
    if (!extending) {
        return;
    }
    if (error == 0) {
        uint64_t known = atomic_load(&file->known_size);
        while (known < end && !atomic_compare_exchange_weak(&file->known_size, &known, end)) {
        }
    }
    pthread_rwlock_unlock(&file->extend_lock);
}

int host_write(struct host_file *file, const void *buffer, uint64_t offset, uint64_t length)
{
    bool extending = write_begin(file, offset + length);
    int error = atomic_load(&file->direct) ? direct_write(file, buffer, offset, length)
                                           : buffered_write(file, buffer, offset, length);
    write_end(file, offset + length, extending, error);
    return error;
}

int host_write_nowait(struct host_file *file, const void *buffer, uint64_t offset, uint64_t length)
{
    if (offset + length > atomic_load(&file->known_size)) {
        return EAGAIN; /* extend_lock, which GROW may hold while it waits for the host */
    }
    int error = file->in_memory ? buffered_write(file, buffer, offset, length)
                                : nowait_write(file, buffer, offset, length);
    host_wrote(file);
    return error;
}

static int write_vector(const struct host_file *file, struct iovec *vector, int count, uint64_t offset)
{
    while (count > 0) {
        ssize_t written = pwritev(file->fd, vector, count, (off_t)offset);
        if (written < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (written == 0) {
            return EIO;
        }
        offset += (uint64_t)written;
        size_t left = (size_t)written;
        while (count > 0 && left >= vector->iov_len) {
            left -= vector->iov_len;
            vector++;
            count--;
        }
        if (count > 0) {
            vector->iov_base = (uint8_t *)vector->iov_base + left;
            vector->iov_len -= left;
        }
    }
    return 0;
}

int host_write_vector(struct host_file *file, struct iovec *vector, int count, uint64_t offset)
{
    uint64_t end = offset;
    for (int i = 0; i < count; i++) {
        end += vector[i].iov_len;
    }
    bool extending = write_begin(file, end);
    int error = write_vector(file, vector, count, offset);
    write_end(file, end, extending, error);
    return error;
}

int host_punch(struct host_file *file, uint64_t offset, uint64_t length)
{
    int result;
    do {
        result = fallocate(file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    } while (result < 0 && errno == EINTR);
    if (result < 0) {
        return errno;
    }
    atomic_store(&file->solid_until, 0);
    atomic_store(&file->dirty, true);
    return 0;
}

int host_clone(struct host_file *target, uint64_t offset, const struct host_file *source, uint64_t source_offset,
               uint64_t length)
{
    struct file_clone_range range = {
        .src_fd = source->fd, .src_offset = source->start + source_offset, .src_length = length, .dest_offset = offset};
    int result;

    do {
        result = ioctl(target->fd, FICLONERANGE, &range);
    } while (result < 0 && errno == EINTR);
    int error = result < 0 ? errno : 0;
    atomic_store(&target->solid_until, 0); /* the source may have holes there */
    host_wrote(target);
    return error;
}

static int change_length(struct host_file *file, uint64_t size, bool shorter)
{
    uint64_t now = 0;
    int error;

    pthread_rwlock_wrlock(&file->extend_lock);
    error = host_size(file, &now);
    if (error == 0) {
        error = host_judge_size(file, atomic_load(&file->known_size), now);
    }
    if (error == 0 && (shorter ? now > size : now < size)) {
        if (file->block_device) {
            error = shorter ? EINVAL : ENOSPC;
        } else {
            int result;
            do {
                result = ftruncate(file->fd, (off_t)size);
            } while (result < 0 && errno == EINTR);
            error = result < 0 ? errno : 0;
        }
        if (error == 0) {
            atomic_store(&file->known_size, size);
            atomic_store(&file->solid_until, 0);
            atomic_store(&file->dirty, true);
        }
    }
    pthread_rwlock_unlock(&file->extend_lock);
    return error;
}

int host_grow(struct host_file *file, uint64_t size)
{
    return change_length(file, size, false);
}

int host_shorten(struct host_file *file, uint64_t size)
{
    return change_length(file, size, true);
}

int host_allocate(struct host_file *file, uint64_t offset, uint64_t length)
{
    int result;

    if (file->block_device || length == 0) {
        return 0;
    }
    do {
        result = fallocate(file->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    } while (result < 0 && errno == EINTR);
    if (result < 0) {
        return errno;
    }
    atomic_store(&file->dirty, true);
    return 0;
}

int host_sync(struct host_file *file)
{
    int error;

    if (!file->writable) {
        return 0;
    }
    /* The lock makes a second caller wait for the fdatasync that the first one is in. */
    pthread_mutex_lock(&file->sync_lock);
    if (file->sync_error == 0 && atomic_exchange(&file->dirty, false)) {
        uint64_t known = atomic_load(&file->known_size), size = 0;
        int result;
        do {
            result = fdatasync(file->fd);
        } while (result < 0 && errno == EINTR);
        if (result < 0) {
            /* Linux marks the pages clean after it has reported the error, so a second try would
             * succeed without the data being on the disk: the first failure stands for good. */
            file->sync_error = errno;
        } else {
            int error_of_size = host_size(file, &size);
            file->sync_error = error_of_size != 0 ? error_of_size : host_judge_size(file, known, size);
        }
    }
    error = file->sync_error;
    pthread_mutex_unlock(&file->sync_lock);
    return error;
}
