/* Requests of data nodes: answered by the engine at once, or parked. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "fuse/internal.h"

/* What an OPEN answers as its handle: all that a data node needs to know of it. */
#define HANDLE_READING 0u
#define HANDLE_WRITING 1u
#define HANDLE_DIRECT 2u /* the kernel sends no FSYNC after a write that is to be durable when it returns */

#ifndef FOPEN_PASSTHROUGH
#define FOPEN_PASSTHROUGH (1u << 7)
#endif

/* Headers of Linux before 6.9 call this field padding, later ones backing_id. */
#define BACKING_ID_OFFSET (offsetof(struct fuse_open_out, open_flags) + sizeof(uint32_t))
_Static_assert(BACKING_ID_OFFSET + sizeof(int32_t) == sizeof(struct fuse_open_out), "the last field of the answer");

struct data_request {
    const struct fuse_thread *thread;
    const struct fuse_node *node;
    struct fuse_buffer **buffer;
    struct fuse_in_header header;
    size_t length; /* of the whole message */
};

static void refuse(const struct data_request *request, int error)
{
    fuse_reply(request->thread->fd, request->header.unique, error, NULL, 0);
}

static void accept_plainly(const struct data_request *request)
{
    fuse_reply(request->thread->fd, request->header.unique, 0, NULL, 0);
}

/* What follows the header, whole; else the request is refused. */
static bool take_body(const struct data_request *request, void *body, size_t length)
{
    if (request->length - sizeof request->header < length) {
        refuse(request, EINVAL);
        return false;
    }
    memcpy(body, (*request->buffer)->memory + BUFFER_MESSAGE_AT + sizeof request->header, length);
    return true;
}

static struct fuse_call call_of(const struct data_request *request, uint32_t kind, uint64_t offset, uint64_t length)
{
    return (struct fuse_call){
        .node = request->node,
        .unique = request->header.unique,
        .since = metrics_begin(fuse_metric_of(kind), offset, length),
        .fd = request->thread->fd,
        .request = kind,
        .offset = offset,
        .length = length,
    };
}

/* What cannot be moved in this thread goes on elsewhere: a WRITE with the thread's buffer, which has its data; a READ
 * without any, from its start. */
static void leave(const struct data_request *request, const struct fuse_call *call, bool waits)
{
    tapfs_fuse *server = request->thread->server;
    struct fuse_call *kept = fuse_call_keep(server, call);

    if (kept == NULL) {
        return;
    }
    if (call->request == TAPFS_FUSE_WRITE) {
        fuse_buffer_to_write(server, call->buffer);
        *request->buffer = NULL;
    } else {
        kept->buffer = NULL;
        kept->done = 0;
    }
    if (!waits) {
        fuse_park(server, kept);
    } else if (!fuse_moves_add(server, kept)) {
        fuse_end(server, kept, EIO, 0);
    }
}

static void move(const struct data_request *request, struct fuse_call *call)
{
    tapfs_fuse *server = request->thread->server;

    call->buffer = *request->buffer;
    enum fuse_fate fate = fuse_move_in_thread(server, call);
    if (fate == FATE_MOVED && call->durable) {
        struct fuse_call *kept = fuse_call_keep(server, call);
        if (kept != NULL) {
            kept->buffer = NULL; /* the thread's */
            fuse_end(server, kept, 0, 0);
        }
    } else if (fate == FATE_MOVED) {
        fuse_answer(server, call, 0, 0);
    } else {
        leave(request, call, fate == FATE_WAITS);
    }
}

static void serve_read(const struct data_request *request)
{
    struct fuse_read_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    if (in.size > MESSAGE_DATA_MAX) {
        refuse(request, EINVAL);
        return;
    }
    uint64_t size = fuse_node_size(request->node);
    if (in.offset >= size) {
        accept_plainly(request); /* the end of the file */
    } else {
        struct fuse_call call = call_of(request, TAPFS_FUSE_READ, in.offset, minimum(in.size, size - in.offset));
        move(request, &call);
    }
}

static void serve_write(const struct data_request *request)
{
    struct fuse_write_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    if (in.size > MESSAGE_DATA_MAX || in.size > request->length - WRITE_HEADERS) {
        refuse(request, EINVAL);
    } else if (!request->node->writable) {
        refuse(request, EROFS);
    } else if (in.offset >= request->node->size && in.size > 0) {
        refuse(request, ENOSPC); /* like a block device */
    } else {
        struct fuse_call call =
            call_of(request, TAPFS_FUSE_WRITE, in.offset,
                    in.size == 0 ? 0 : minimum(in.size, request->node->size - in.offset));
        /* The flags are those of the file, and of this write (RWF_DSYNC, RWF_SYNC). */
        call.durable = (in.fh & HANDLE_DIRECT) != 0 && (in.flags & O_DSYNC) != 0;
        move(request, &call);
    }
}

static void serve_open(const struct data_request *request)
{
    tapfs_fuse *server = request->thread->server;
    struct fuse_open_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    bool writing = (in.flags & O_ACCMODE) != O_RDONLY;
    if (writing && !request->node->writable) {
        refuse(request, EROFS);
        return;
    }
    struct fuse_open_out out = {.fh = writing ? HANDLE_WRITING : HANDLE_READING};
    int32_t backing_id = atomic_load(&request->node->backing_id);
    if (backing_id != 0) {
        /* The kernel allows no other flag beside this one. */
        out.open_flags = FOPEN_PASSTHROUGH;
        memcpy((char *)&out + BACKING_ID_OFFSET, &backing_id, sizeof backing_id);
    } else {
        /* Windows of a writable disk may overlap, and their page caches know nothing of each other. */
        out.open_flags = server->writable ? 0 : FOPEN_KEEP_CACHE;
        uint32_t direct = atomic_load(&server->direct_opens);
        if (writing && (in.flags & O_DIRECT) != 0 && direct != 0) {
            out.open_flags |= direct;
            out.fh |= HANDLE_DIRECT;
        }
    }
    fuse_reply(request->thread->fd, request->header.unique, 0, &out, sizeof out);
}

static void park(const struct data_request *request, uint32_t kind, uint64_t offset, uint64_t length)
{
    tapfs_fuse *server = request->thread->server;
    struct fuse_call call = call_of(request, kind, offset, length);
    struct fuse_call *kept = fuse_call_keep(server, &call);
    if (kept != NULL) {
        fuse_park(server, kept);
    }
}

static void park_sync(const struct data_request *request)
{
    fuse_note_passthrough(request->thread->server);
    park(request, TAPFS_FUSE_SYNC, 0, 0);
}

static void serve_sync(const struct data_request *request)
{
    struct fuse_fsync_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    if (request->thread->server->writable) {
        park_sync(request);
    } else {
        accept_plainly(request);
    }
}

/* A descriptor is closed: what was written through it becomes durable. */
static void serve_flush(const struct data_request *request)
{
    struct fuse_flush_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    if ((in.fh & HANDLE_WRITING) != 0 && request->node->writable) {
        park_sync(request);
    } else {
        accept_plainly(request);
    }
}

static void serve_fallocate(const struct data_request *request)
{
    struct fuse_fallocate_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    const uint32_t keep = FALLOC_FL_KEEP_SIZE;
    uint64_t size = request->node->size;
    bool zeroes = in.mode == (FALLOC_FL_PUNCH_HOLE | keep) || in.mode == (FALLOC_FL_ZERO_RANGE | keep) ||
                  in.mode == FALLOC_FL_ZERO_RANGE;
    if (!zeroes) {
        refuse(request, EOPNOTSUPP); /* space is taken when data comes, nothing can be shifted */
    } else if (!request->node->writable) {
        refuse(request, EROFS);
    } else if (in.length == 0 || !in_host_range(in.offset, in.length)) {
        refuse(request, EINVAL);
    } else if (in.offset + in.length > size && (in.mode & keep) == 0) {
        refuse(request, ENOSPC);
    } else if (in.offset >= size) {
        accept_plainly(request);
    } else {
        park(request, TAPFS_FUSE_ZERO, in.offset, minimum(in.length, size - in.offset));
    }
}

static void serve_lseek(const struct data_request *request)
{
    struct fuse_lseek_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE) {
        refuse(request, EINVAL);
    } else if (in.offset >= request->node->size) {
        refuse(request, ENXIO);
    } else {
        park(request, in.whence == SEEK_DATA ? TAPFS_FUSE_SEEK_DATA : TAPFS_FUSE_SEEK_HOLE, in.offset,
             request->node->size - in.offset);
    }
}

/* A file of pieces has no holes that would be worth telling of: where the disk has one, the image has no place. */
static void seek_made(const struct data_request *request)
{
    struct fuse_lseek_in in;
    if (!take_body(request, &in, sizeof in)) {
        return;
    }
    uint64_t size = fuse_node_size(request->node);
    if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE) {
        refuse(request, EINVAL);
    } else if (in.offset >= size) {
        refuse(request, ENXIO);
    } else {
        struct fuse_lseek_out out = {.offset = in.whence == SEEK_DATA ? in.offset : size};
        fuse_reply(request->thread->fd, request->header.unique, 0, &out, sizeof out);
    }
}

/* What the session has opened it closes, so only what moves or finds bytes is answered here. */
static bool serve_made(const struct data_request *request)
{
    if (atomic_load(&request->node->pieces) == NULL) {
        return false;
    }
    switch (request->header.opcode) {
    case FUSE_READ:
        serve_read(request);
        return true;
    case FUSE_LSEEK:
        seek_made(request);
        return true;
    default:
        return false;
    }
}

bool fuse_data_request(const struct fuse_thread *thread, struct fuse_buffer **buffer, size_t length)
{
    struct data_request request = {.thread = thread, .buffer = buffer, .length = length};
    memcpy(&request.header, (*buffer)->memory + BUFFER_MESSAGE_AT, sizeof request.header);
    request.node = fuse_find_node(thread->server, request.header.nodeid);
    if (request.node == NULL) {
        return false;
    }
    if (request.node->made_later) {
        return serve_made(&request);
    }
    switch (request.header.opcode) {
    case FUSE_READ:
        serve_read(&request);
        return true;
    case FUSE_WRITE:
        serve_write(&request);
        return true;
    case FUSE_OPEN:
        serve_open(&request);
        return true;
    case FUSE_RELEASE:
        accept_plainly(&request);
        return true;
    case FUSE_FSYNC:
        serve_sync(&request);
        return true;
    case FUSE_FLUSH:
        serve_flush(&request);
        return true;
    case FUSE_FALLOCATE:
        serve_fallocate(&request);
        return true;
    case FUSE_LSEEK:
        serve_lseek(&request);
        return true;
    default:
        return false;
    }
}
