/* The agreement with the kernel at INIT: libfuse's answer, amended for native threads. */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "fuse/internal.h"

/* The flags of both words as one. What is newer than the oldest header that we build with is defined here. */
#define INIT_AUTO_INVAL_DATA (UINT64_C(1) << 12)
#define INIT_ASYNC_READ (UINT64_C(1) << 0)
#define INIT_ATOMIC_O_TRUNC (UINT64_C(1) << 3)
#define INIT_ASYNC_DIO (UINT64_C(1) << 15)
#define INIT_WRITEBACK_CACHE (UINT64_C(1) << 16)
#define INIT_PARALLEL_DIROPS (UINT64_C(1) << 18)
#define INIT_MAX_PAGES (UINT64_C(1) << 22)
#define INIT_EXT (UINT64_C(1) << 30)
#define INIT_DIRECT_IO_ALLOW_MMAP (UINT64_C(1) << 36)
#define INIT_PASSTHROUGH (UINT64_C(1) << 37)
#define INIT_HAS_RESEND (UINT64_C(1) << 39)

/* Has the kernel give every request again that was read and not answered (Linux 6.9). */
#define NOTIFY_RESEND 7

/* Requests of the kernel's own (readahead, asynchronous I/O) that may be under way; its default is 12. */
#define BACKGROUND_REQUESTS 64
#define CONGESTED_REQUESTS 48

/* fuse_init_in and fuse_init_out of protocol 7.40; what an older kernel sends or takes is their beginning. */
struct init_in {
    uint32_t major, minor, max_readahead, flags, flags2, unused[11];
};

struct init_out {
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth, unused[6];
};

/* Through max_write: libfuse has never answered less. */
#define INIT_OUT_MIN_BYTES offsetof(struct init_out, time_gran)

struct backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};

#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

void fuse_init_asked(tapfs_fuse *server, const uint8_t *message, size_t length)
{
    struct fuse_in_header header;
    struct init_in in = {.major = 0};

    memcpy(&header, message, sizeof header);
    memcpy(&in, message + sizeof header, minimum(length - sizeof header, sizeof in));
    uint64_t flags = in.flags;
    if ((flags & INIT_EXT) != 0) {
        flags |= (uint64_t)in.flags2 << 32;
    }
    atomic_store(&server->offered, flags);
    atomic_store(&server->init_unique, header.unique);
    if (!server->taken_over && length <= sizeof server->init) {
        pthread_mutex_lock(&server->forward_lock);
        memcpy(server->init, message, length);
        server->init_length = length;
        pthread_mutex_unlock(&server->forward_lock);
    }
}

size_t tapfs_fuse_init_request(tapfs_fuse *server, void *init, size_t capacity)
{
    pthread_mutex_lock(&server->forward_lock);
    size_t length = server->init_length;
    if (length > capacity || (atomic_load(&server->offered) & INIT_HAS_RESEND) == 0) {
        length = 0;
    }
    memcpy(init, server->init, length);
    pthread_mutex_unlock(&server->forward_lock);
    return length;
}

int tapfs_fuse_take_over(tapfs_fuse *server, const void *init, size_t length)
{
    if (length < sizeof(struct fuse_in_header) || length > sizeof server->init || server->thread_count != 0) {
        return -EINVAL;
    }
    memcpy(server->init, init, length);
    server->init_length = length;
    /* Before any thread reads: what is given again now was read by the predecessor, and by nobody else. */
    struct fuse_out_header again = {.len = sizeof again, .error = NOTIFY_RESEND, .unique = 0};
    if (write(server->fuse_fd, &again, sizeof again) < 0) {
        return -errno;
    }
    server->taken_over = true;
    return 0;
}

int tapfs_fuse_set_backing(tapfs_fuse *server, uint64_t inode, int32_t backing_id)
{
    struct fuse_node *node = fuse_find_node(server, inode);
    if (node == NULL || backing_id <= 0 || server->thread_count != 0) {
        return -EINVAL;
    }
    atomic_store(&node->backing_id, backing_id);
    atomic_fetch_add(&server->passthrough_nodes, 1);
    return 0;
}

int32_t tapfs_fuse_backing(tapfs_fuse *server, uint64_t inode)
{
    struct fuse_node *node = fuse_find_node(server, inode);
    return node == NULL ? 0 : atomic_load(&node->backing_id);
}

static bool has_backing(const tapfs_fuse *server)
{
    for (size_t i = 0; i < server->node_count; i++) {
        if (server->nodes[i].backing_fd >= 0) {
            return true;
        }
    }
    return false;
}

size_t fuse_init_amend(tapfs_fuse *server, uint8_t *message, size_t length, size_t capacity)
{
    struct fuse_out_header header;
    struct init_out out = {.major = 0};
    uint64_t offered = atomic_load(&server->offered);

    memcpy(&header, message, sizeof header);
    size_t body = length - sizeof header;
    if (body < INIT_OUT_MIN_BYTES || body > sizeof out || capacity < sizeof header + sizeof out) {
        return length;
    }
    memcpy(&out, message + sizeof header, body);
    uint64_t flags = out.flags | ((out.flags & INIT_EXT) != 0 ? (uint64_t)out.flags2 << 32 : 0);
    /* Nobody changes the disk but through this mount, so the page cache need not be dropped, nor the
     * attributes fetched before every read, because a write has changed the time of the file. */
    flags &= ~INIT_AUTO_INVAL_DATA;
    /* With this the kernel makes the size 0 and drops the pages of a file that is opened with O_TRUNC, dirty ones of
     * others included, and asks nobody. Without it the session is asked to truncate, and the disk keeps its size. */
    flags &= ~INIT_ATOMIC_O_TRUNC;
    flags |= offered & (INIT_ASYNC_READ | INIT_ASYNC_DIO | INIT_PARALLEL_DIROPS);
    out.max_background = BACKGROUND_REQUESTS;
    out.congestion_threshold = CONGESTED_REQUESTS;
    if ((offered & INIT_MAX_PAGES) != 0) {
        flags |= INIT_MAX_PAGES;
        out.max_pages = MESSAGE_PAGES;
        out.max_write = MESSAGE_DATA_MAX;
    } else {
        out.max_write = (uint32_t)minimum(out.max_write, MESSAGE_DATA_MAX);
    }
    if ((offered & INIT_EXT) != 0) {
        if ((offered & INIT_DIRECT_IO_ALLOW_MMAP) != 0) {
            /* Writers with O_DIRECT need not wait for each other, and may map the file all the same. */
            flags |= INIT_EXT | INIT_DIRECT_IO_ALLOW_MMAP;
            atomic_store(&server->direct_opens, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES);
        }
        if ((offered & INIT_PASSTHROUGH) != 0 && (flags & INIT_WRITEBACK_CACHE) == 0 && has_backing(server)) {
            flags |= INIT_EXT | INIT_PASSTHROUGH;
            out.max_stack_depth = 1;
        }
    }
    out.flags = (uint32_t)flags;
    out.flags2 = (uint32_t)(flags >> 32);
    /* An old kernel takes the length that it knows, and libfuse has answered in that. */
    size_t grown = (flags & INIT_EXT) != 0 ? sizeof out : body;
    header.len = (uint32_t)(sizeof header + grown);
    memcpy(message, &header, sizeof header);
    memcpy(message + sizeof header, &out, grown);
    return header.len;
}

void fuse_init_answered(tapfs_fuse *server)
{
    if (server->taken_over || (atomic_load(&server->offered) & INIT_PASSTHROUGH) == 0) {
        return; /* a predecessor has registered what there is */
    }
    for (size_t i = 0; i < server->node_count; i++) {
        struct fuse_node *node = &server->nodes[i];
        if (node->backing_fd < 0) {
            continue;
        }
        struct backing_map map = {.fd = node->backing_fd};
        /* It may be refused: without the privilege, or on a file system that is stacked itself. */
        int id = ioctl(server->fuse_fd, BACKING_OPEN, &map);
        if (id > 0) {
            atomic_store(&node->backing_id, id);
            atomic_fetch_add(&server->passthrough_nodes, 1);
        }
    }
}

void fuse_note_passthrough(tapfs_fuse *server)
{
    if (server->writable && atomic_load(&server->passthrough_nodes) > 0) {
        disk_note_foreign_writes(server->disk);
    }
}

void fuse_backing_close(tapfs_fuse *server)
{
    for (size_t i = 0; i < server->node_count; i++) {
        uint32_t id = (uint32_t)atomic_load(&server->nodes[i].backing_id);
        if (id != 0) {
            ioctl(server->fuse_fd, BACKING_CLOSE, &id);
        }
    }
}
