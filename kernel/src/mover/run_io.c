/* One run of a move between the parts that it belongs to and its place on the host. */
#include <errno.h>
#include <string.h>

#include "mover/internal.h"

void run_ios_begin(struct flight *flight)
{
    uint64_t position = flight->request.position;

    flight->slices_used = 0;
    flight->begun = 0;
    if (flight->cursor == position) {
        return;
    }
    flight->cursor = position;
    flight->part = 0;
    flight->part_inner = position - flight->move->offset;
    while (flight->part_inner > 0 && flight->part_inner >= flight->move->parts[flight->part].iov_len) {
        flight->part_inner -= flight->move->parts[flight->part++].iov_len;
    }
}

void run_io_prepare(struct flight *flight, uint32_t index)
{
    struct run_io *io = &flight->ios[index];
    uint64_t left = flight->route.runs[index].length;

    io->slices = flight->slices + flight->slices_used;
    io->slice_count = 0;
    io->moved = 0;
    io->state = RUN_IO_WAITING;
    io->locked = false;
    flight->cursor += left;
    while (left > 0) {
        const struct iovec *part = &flight->move->parts[flight->part];
        uint64_t length = minimum(part->iov_len - flight->part_inner, left);
        if (length > 0) {
            io->slices[io->slice_count++] = (struct iovec){
                .iov_base = (uint8_t *)part->iov_base + flight->part_inner,
                .iov_len = length,
            };
        }
        left -= length;
        flight->part_inner += length;
        if (flight->part_inner == part->iov_len) {
            flight->part++;
            flight->part_inner = 0;
        }
    }
    flight->slices_used += io->slice_count;
}

static void clear(const struct run_io *io)
{
    for (uint32_t i = 0; i < io->slice_count; i++) {
        memset(io->slices[i].iov_base, 0, io->slices[i].iov_len);
    }
}

void run_io_end(struct flight *flight, uint32_t index, int state)
{
    struct run_io *io = &flight->ios[index];
    io->state = state;
    if (io->locked) {
        range_lock_release(&flight->request.disk->ranges, &io->blocks);
        io->locked = false;
    }
}

static void fail(struct flight *flight, uint32_t index, int error)
{
    flight->ios[index].error = error;
    run_io_end(flight, index, RUN_IO_FAILED);
}

/* What a system call moved; true: the run is over. */
static bool count_moved(struct flight *flight, uint32_t index, uint64_t count)
{
    struct run_io *io = &flight->ios[index];

    if (count == 0) {
        if (flight->move->writing) {
            fail(flight, index, EIO);
        } else {
            run_io_end(flight, index, RUN_IO_REFUSED); /* the engine knows what is behind the end of a file */
        }
        return true;
    }
    io->moved += count;
    if (io->moved == flight->route.runs[index].length) {
        run_io_end(flight, index, RUN_IO_MOVED);
        return true;
    }
    while (count >= io->slices->iov_len) {
        count -= io->slices->iov_len;
        io->slices++;
        io->slice_count--;
    }
    io->slices->iov_base = (uint8_t *)io->slices->iov_base + count;
    io->slices->iov_len -= count;
    return false;
}

/*
 * Whether a write may go to the host beside the engine's own: inside what the file is known to have, so that GROW
 * need not be kept away, and with its blocks held where others read before they write.
 */
static bool may_write(struct flight *flight, uint32_t index)
{
    struct run_io *io = &flight->ios[index];
    const struct run *run = &flight->route.runs[index];

    if (run->host_offset + run->length > atomic_load(&run->file->known_size)) {
        return false;
    }
    if (run->file->ranged && !io->locked) {
        io->blocks = (struct range_holder){
            .object = run->file,
            .start = round_down(run->host_offset, run->file->direct_block),
            .end = round_up(run->host_offset + run->length, run->file->direct_block),
            .exclusive = true,
        };
        io->locked = range_lock_acquire(&flight->request.disk->ranges, &io->blocks, true);
        return io->locked;
    }
    return true;
}

/* Whatever the error is: who tries it again without RWF_NOWAIT gets it too. */
static void ask_host(struct flight *flight, uint32_t index)
{
    struct run_io *io = &flight->ios[index];
    const struct run *run = &flight->route.runs[index];
    bool writing = flight->move->writing;
    int flags = run->file->in_memory ? 0 : RWF_NOWAIT;

    for (;;) {
        off_t at = (off_t)(run->file->start + run->host_offset + io->moved);
        int slices = (int)io->slice_count;
        ssize_t count = writing ? pwritev2(run->file->fd, io->slices, slices, at, flags)
                                : preadv2(run->file->fd, io->slices, slices, at, flags);
        if (count == 0 && !writing && flags != 0) {
            return; /* Linux 5.9 and 5.10 may say so for "not now" (preadv2(2), BUGS): who waits finds out */
        }
        if (count >= 0) {
            if (!writing && flags != 0 && !atomic_load(&run->file->takes_nowait)) {
                atomic_store(&run->file->takes_nowait, true);
            }
            if (count_moved(flight, index, (uint64_t)count)) {
                return;
            }
        } else if (errno != EINTR) {
            if (errno == EOPNOTSUPP || errno == EINVAL || errno == ENOSYS) {
                atomic_store(&run->file->refuses_nowait[writing], true);
            }
            return;
        }
    }
}

/* Whether a transfer without waiting makes sense. */
static bool may_try(const struct host_file *file, bool writing)
{
    return file->in_memory || !(atomic_load(&file->direct) || atomic_load(&file->refuses_nowait[writing]));
}

bool run_io_may_be_queued_first(const struct flight *flight, uint32_t index, const struct io_rings *rings)
{
    const struct host_file *file = flight->route.runs[index].file;

    /* Only reads, and only of files that the kernel is known to read without waiting: a submission may wait for others. */
    return flight->move->among_others && !flight->move->writing && rings->fd >= 0 && file != NULL &&
           atomic_load(&file->takes_nowait) && may_try(file, false);
}

int run_io_at_once(struct flight *flight, uint32_t index)
{
    const struct run *run = &flight->route.runs[index];
    bool writing = flight->move->writing;

    if (run->file == NULL) {
        clear(&flight->ios[index]);
        run_io_end(flight, index, RUN_IO_MOVED);
    } else if (may_try(run->file, writing) && (!writing || may_write(flight, index))) {
        ask_host(flight, index);
        if (writing) {
            host_wrote(run->file);
        }
    }
    return flight->ios[index].state;
}

static bool is_aligned(const struct run_io *io, const struct run *run)
{
    uint64_t lengths = run->host_offset + io->moved, addresses = 0;
    for (uint32_t i = 0; i < io->slice_count; i++) {
        addresses |= (uintptr_t)io->slices[i].iov_base;
        lengths |= io->slices[i].iov_len;
    }
    return addresses % run->file->memory_alignment == 0 && lengths % run->file->offset_alignment == 0;
}

bool run_io_queue(struct flight *flight, uint32_t index, struct io_rings *rings, struct uring_memory *memory,
                  uint64_t tag)
{
    const struct run_io *io = &flight->ios[index];
    const struct run *run = &flight->route.runs[index];

    if ((atomic_load(&run->file->direct) && !is_aligned(io, run)) ||
        (flight->move->writing && !may_write(flight, index))) {
        return false;
    }
    const struct uring_transfer transfer = {
        .fd = run->file->fd,
        .writing = flight->move->writing,
        /* io_uring takes a file that can be polled, like one of FUSE, for one that does not wait. */
        .direct = atomic_load(&run->file->direct),
        .by_thread = atomic_load(&run->file->refuses_nowait[flight->move->writing]),
        .vector = io->slices,
        .count = io->slice_count,
        .offset = run->file->start + run->host_offset + io->moved,
    };
    return uring_queue(rings, &transfer, uring_registered(rings, memory, &transfer), tag);
}

bool run_io_claim(struct flight *flight)
{
    const struct run *run = &flight->route.runs[0];

    flight->begun = 1;
    flight->ios[0] = (struct run_io){.state = RUN_IO_WAITING};
    /* io_uring leaves a file on tmpfs to a thread of the kernel, which costs more than a copy. */
    if (run->file == NULL || run->file->in_memory || (flight->move->writing && !may_write(flight, 0))) {
        return false;
    }
    /* What memory a direct transfer can use the host knows alone: it refuses one (EINVAL) that does not suit it. */
    return !atomic_load(&run->file->direct) ||
           (run->host_offset % run->file->offset_alignment == 0 && run->length % run->file->offset_alignment == 0);
}

bool run_io_complete(struct flight *flight, uint32_t index, int32_t result, struct io_rings *rings,
                     struct uring_memory *memory, uint64_t tag)
{
    if (flight->move->writing) {
        host_wrote(flight->route.runs[index].file);
    }
    if (result == 0 && !flight->move->writing) {
        run_io_end(flight, index, RUN_IO_REFUSED); /* the end of the file, or Linux 5.9 and 5.10 as above */
    } else if (result >= 0) {
        if (count_moved(flight, index, (uint64_t)result)) {
            return true;
        }
        /* Under O_DIRECT a file that ends inside a block leaves nothing that is aligned. */
        if (run_io_queue(flight, index, rings, memory, tag)) {
            return false;
        }
        run_io_end(flight, index, RUN_IO_REFUSED);
    } else if (result == -EINVAL || result == -EAGAIN || result == -EINTR || result == -ECANCELED ||
               result == -EOPNOTSUPP) {
        /* EINVAL: a host that knows no O_DIRECT. The others say something about the ring, not the file. */
        run_io_end(flight, index, RUN_IO_REFUSED);
    } else {
        fail(flight, index, -result);
    }
    return true;
}
