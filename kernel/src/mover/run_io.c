/* One run of a move between the parts that it belongs to and its place on the host. */
#include <errno.h>
#include <string.h>

#include "mover/internal.h"

void transfers_begin(struct flight *flight)
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

void transfer_prepare(struct flight *flight, uint32_t index)
{
    struct transfer *transfer = &flight->transfers[index];
    uint64_t left = flight->route.runs[index].length;

    transfer->slices = flight->slices + flight->slices_used;
    transfer->slice_count = 0;
    transfer->moved = 0;
    transfer->state = TRANSFER_WAITING;
    transfer->locked = false;
    flight->cursor += left;
    while (left > 0) {
        const struct iovec *part = &flight->move->parts[flight->part];
        uint64_t length = minimum(part->iov_len - flight->part_inner, left);
        if (length > 0) {
            transfer->slices[transfer->slice_count++] = (struct iovec){
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
    flight->slices_used += transfer->slice_count;
}

static void clear(const struct transfer *transfer)
{
    for (uint32_t i = 0; i < transfer->slice_count; i++) {
        memset(transfer->slices[i].iov_base, 0, transfer->slices[i].iov_len);
    }
}

void transfer_end(struct flight *flight, uint32_t index, int state)
{
    struct transfer *transfer = &flight->transfers[index];
    transfer->state = state;
    if (transfer->locked) {
        range_lock_release(&flight->request.disk->ranges, &transfer->blocks);
        transfer->locked = false;
    }
}

static void fail(struct flight *flight, uint32_t index, int error)
{
    flight->transfers[index].error = error;
    transfer_end(flight, index, TRANSFER_FAILED);
}

/* The host file has ended: zeros, unless the layer is an identity. */
static void meet_end_of_file(struct flight *flight, uint32_t index)
{
    if (flight->request.disk->layers[flight->route.runs[index].layer]->geometry.identity) {
        fail(flight, index, EIO);
        return;
    }
    clear(&flight->transfers[index]);
    transfer_end(flight, index, TRANSFER_MOVED);
}

/* What a system call moved; true: the run is over. */
static bool count_moved(struct flight *flight, uint32_t index, uint64_t count)
{
    struct transfer *transfer = &flight->transfers[index];

    if (count == 0) {
        if (flight->move->writing) {
            fail(flight, index, EIO);
        } else {
            meet_end_of_file(flight, index);
        }
        return true;
    }
    transfer->moved += count;
    if (transfer->moved == flight->route.runs[index].length) {
        transfer_end(flight, index, TRANSFER_MOVED);
        return true;
    }
    while (count >= transfer->slices->iov_len) {
        count -= transfer->slices->iov_len;
        transfer->slices++;
        transfer->slice_count--;
    }
    transfer->slices->iov_base = (uint8_t *)transfer->slices->iov_base + count;
    transfer->slices->iov_len -= count;
    return false;
}

/*
 * Whether a write may go to the host beside the engine's own: inside what the file is known to have, so that GROW
 * need not be kept away, and with its blocks held where others read before they write.
 */
static bool may_write(struct flight *flight, uint32_t index)
{
    struct transfer *transfer = &flight->transfers[index];
    const struct run *run = &flight->route.runs[index];

    if (run->host_offset + run->length > atomic_load(&run->file->known_size)) {
        return false;
    }
    if (run->file->ranged && !transfer->locked) {
        transfer->blocks = (struct range_holder){
            .object = run->file,
            .start = round_down(run->host_offset, run->file->direct_block),
            .end = round_up(run->host_offset + run->length, run->file->direct_block),
            .exclusive = true,
        };
        transfer->locked = range_lock_acquire(&flight->request.disk->ranges, &transfer->blocks, true);
        return transfer->locked;
    }
    return true;
}

/* Whatever the error is: who tries it again without RWF_NOWAIT gets it too. */
static void ask_host(struct flight *flight, uint32_t index)
{
    struct transfer *transfer = &flight->transfers[index];
    const struct run *run = &flight->route.runs[index];
    bool writing = flight->move->writing;
    int flags = run->file->in_memory ? 0 : RWF_NOWAIT;

    for (;;) {
        off_t at = (off_t)(run->host_offset + transfer->moved);
        int slices = (int)transfer->slice_count;
        ssize_t count = writing ? pwritev2(run->file->fd, transfer->slices, slices, at, flags)
                                : preadv2(run->file->fd, transfer->slices, slices, at, flags);
        if (count == 0 && !writing && flags != 0) {
            return; /* Linux 5.9 and 5.10 may say so for "not now" (preadv2(2), BUGS): who waits finds out */
        }
        if (count >= 0) {
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
static bool may_try(struct host_file *file, bool writing)
{
    return file->in_memory || !(atomic_load(&file->direct) || atomic_load(&file->refuses_nowait[writing]));
}

int transfer_at_once(struct flight *flight, uint32_t index)
{
    const struct run *run = &flight->route.runs[index];
    bool writing = flight->move->writing;

    if (run->file == NULL) {
        clear(&flight->transfers[index]);
        transfer_end(flight, index, TRANSFER_MOVED);
    } else if (may_try(run->file, writing) && (!writing || may_write(flight, index))) {
        ask_host(flight, index);
        if (writing) {
            host_wrote(run->file);
        }
    }
    return flight->transfers[index].state;
}

static bool is_aligned(const struct transfer *transfer, const struct run *run)
{
    uint64_t lengths = run->host_offset + transfer->moved, addresses = 0;
    for (uint32_t i = 0; i < transfer->slice_count; i++) {
        addresses |= (uintptr_t)transfer->slices[i].iov_base;
        lengths |= transfer->slices[i].iov_len;
    }
    return addresses % run->file->memory_alignment == 0 && lengths % run->file->offset_alignment == 0;
}

bool transfer_queue(struct flight *flight, uint32_t index, struct uring *uring, uint64_t tag)
{
    const struct transfer *transfer = &flight->transfers[index];
    const struct run *run = &flight->route.runs[index];

    if ((atomic_load(&run->file->direct) && !is_aligned(transfer, run)) ||
        (flight->move->writing && !may_write(flight, index))) {
        return false;
    }
    return uring_queue(uring, flight->move->writing, run->file->fd, transfer->slices, transfer->slice_count,
                       run->host_offset + transfer->moved, tag);
}

bool transfer_complete(struct flight *flight, uint32_t index, int32_t result, struct uring *uring, uint64_t tag)
{
    if (flight->move->writing) {
        host_wrote(flight->route.runs[index].file);
    }
    if (result == 0 && !flight->move->writing) {
        transfer_end(flight, index, TRANSFER_REFUSED); /* the end of the file, or Linux 5.9 and 5.10 as above */
    } else if (result >= 0) {
        if (count_moved(flight, index, (uint64_t)result)) {
            return true;
        }
        /* Under O_DIRECT a file that ends inside a block leaves nothing that is aligned. */
        if (transfer_queue(flight, index, uring, tag)) {
            return false;
        }
        transfer_end(flight, index, TRANSFER_REFUSED);
    } else if (result == -EINVAL || result == -EAGAIN || result == -EINTR || result == -ECANCELED ||
               result == -EOPNOTSUPP) {
        /* EINVAL: a host that knows no O_DIRECT. The others say something about the ring, not the file. */
        transfer_end(flight, index, TRANSFER_REFUSED);
    } else {
        fail(flight, index, -result);
    }
    return true;
}
