/* Complete transfers of a descriptor that is not, or for the moment not, under O_DIRECT; what of its file is there. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host/host.h"

int host_size(const struct host_file *file, uint64_t *size)
{
    struct stat status;

    if (file->block_device) {
        if (ioctl(file->fd, BLKGETSIZE64, size) < 0) {
            return errno;
        }
    } else if (fstat(file->fd, &status) < 0) {
        return errno;
    } else {
        *size = (uint64_t)status.st_size;
    }
    *size = *size < file->start ? 0 : minimum(*size - file->start, file->window);
    return 0;
}

/* A later write may make the file as long again, with a hole where bytes were: that is why it is remembered. */
int host_judge_size(struct host_file *file, uint64_t known, uint64_t size)
{
    uint64_t cut = atomic_load(&file->cut_at);
    if (file->block_device || (size >= known && cut == UINT64_MAX)) {
        return 0;
    }
    while (size < cut && !atomic_compare_exchange_weak(&file->cut_at, &cut, size)) {
    }
    return HOST_CUT;
}

bool host_absent(const struct host_file *file, uint64_t offset, uint64_t length)
{
    if (file->present == NULL || length == 0) {
        return false;
    }
    offset += file->start;
    uint64_t last = (offset + length - 1) / file->present_block_bytes;
    for (uint64_t block = offset / file->present_block_bytes; block <= last && block < file->present_blocks; block++) {
        /* Acquire: what the owner wrote before it set the byte. */
        if (__atomic_load_n(&file->present[block], __ATOMIC_ACQUIRE) == 0) {
            return true;
        }
    }
    return false;
}

int buffered_read(const struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length, uint64_t *got)
{
    for (*got = 0; *got < length;) {
        ssize_t count = pread(file->fd, buffer + *got, length - *got, (off_t)(file->start + offset + *got));
        if (count == 0) {
            break;
        }
        if (count > 0) {
            *got += (uint64_t)count;
        } else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

void host_expect(const struct host_file *file, uint64_t offset, uint64_t length)
{
    if (!atomic_load(&file->direct) && !file->in_memory && !host_absent(file, offset, length)) {
        posix_fadvise(file->fd, (off_t)(file->start + offset), (off_t)length, POSIX_FADV_WILLNEED);
    }
}

uint64_t host_next_data(const struct host_file *file, uint64_t offset, uint64_t end)
{
    off_t data = lseek(file->fd, (off_t)(file->start + offset), SEEK_DATA);
    if (data < 0) {
        return errno == ENXIO ? end : offset; /* what a host cannot tell is data */
    }
    return minimum((uint64_t)data - file->start, end);
}

uint64_t host_next_hole(struct host_file *file, uint64_t offset, uint64_t end)
{
    uint64_t until = atomic_load(&file->solid_until);
    if (offset < until && offset >= atomic_load(&file->solid_from)) {
        return minimum(until, end);
    }
    off_t hole = lseek(file->fd, (off_t)(file->start + offset), SEEK_HOLE);
    if (hole < 0) {
        return end;
    }
    /* Two of these beside each other may leave a pair that is none. Then a hole is read as data, which it reads as. */
    atomic_store(&file->solid_until, 0);
    atomic_store(&file->solid_from, offset);
    atomic_store(&file->solid_until, (uint64_t)hole - file->start);
    return minimum((uint64_t)hole - file->start, end);
}

int host_look_for_cut(struct host_file *file)
{
    uint64_t known = atomic_load(&file->known_size), size = 0;
    int error = host_size(file, &size);
    return error != 0 ? error : host_judge_size(file, known, size);
}

void host_start_writeback(const struct host_file *file, uint64_t offset, uint64_t length)
{
    if (file->writable && !file->in_memory) {
        /* What fails now stays known of the file, and fdatasync reports it. */
        (void)sync_file_range(file->fd, (off_t)offset, (off_t)length, SYNC_FILE_RANGE_WRITE);
    }
}

int buffered_write(const struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length)
{
    for (uint64_t done = 0; done < length;) {
        ssize_t count = pwrite(file->fd, buffer + done, length - done, (off_t)(offset + done));
        if (count > 0) {
            done += (uint64_t)count;
        } else if (count == 0) {
            return EIO;
        } else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

/* The error of a transfer without waiting. A host that knows no RWF_NOWAIT is not asked again. */
static int nowait_error(struct host_file *file, bool writing, int error)
{
    if (error == EOPNOTSUPP || error == EINVAL || error == ENOSYS) {
        atomic_store(&file->refuses_nowait[writing], true);
        return EOPNOTSUPP;
    }
    return error;
}

int nowait_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length, uint64_t *got)
{
    *got = 0;
    if (atomic_load(&file->refuses_nowait[0])) {
        return EOPNOTSUPP;
    }
    while (*got < length) {
        struct iovec vector = {.iov_base = buffer + *got, .iov_len = length - *got};
        ssize_t count = preadv2(file->fd, &vector, 1, (off_t)(file->start + offset + *got), RWF_NOWAIT);
        if (count > 0) {
            *got += (uint64_t)count;
        } else if (count == 0) {
            /* Linux 5.9 and 5.10 may say so for "not now" (preadv2(2), BUGS): who waits finds out. */
            return EAGAIN;
        } else if (errno != EINTR) {
            return nowait_error(file, false, errno);
        }
    }
    return 0;
}

int nowait_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length)
{
    if (atomic_load(&file->refuses_nowait[1])) {
        return EOPNOTSUPP;
    }
    for (uint64_t done = 0; done < length;) {
        /* struct iovec serves readers too, hence not const. */
        struct iovec vector = {.iov_base = (void *)(uintptr_t)(buffer + done), .iov_len = length - done};
        ssize_t count = pwritev2(file->fd, &vector, 1, (off_t)(offset + done), RWF_NOWAIT);
        if (count > 0) {
            done += (uint64_t)count;
        } else if (count == 0) {
            return EIO;
        } else if (errno != EINTR) {
            return nowait_error(file, true, errno);
        }
    }
    return 0;
}
