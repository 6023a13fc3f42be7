/*
 * Files made of pieces of the disk and of metadata: a disk as the file of an image of another format.
 *
 * Such a node is there before its file is. Its requests go to the session until the owner has given the pieces, which
 * happens once, while the server runs. After that they do not change.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuse/internal.h"

static bool pieces_are_valid(const struct fuse_pieces *pieces, uint64_t disk_size)
{
    uint64_t end = 0;
    for (size_t i = 0; i < pieces->count; i++) {
        uint64_t start = pieces->starts[i], length = pieces->lengths[i];
        if (start < end || length > pieces->size || start > pieces->size - length) {
            return false;
        }
        if (length > disk_size || pieces->offsets[i] > disk_size - length) {
            return false;
        }
        end = start + length;
    }
    return true;
}

int tapfs_fuse_give_pieces(tapfs_fuse *server, uint64_t inode, uint64_t size, int metadata_fd, const uint64_t *starts,
                           const uint64_t *offsets, const uint64_t *lengths, size_t count)
{
    struct fuse_node *node = fuse_find_node(server, inode);
    const struct layer *top = disk_layer(server->disk, 0);
    const struct fuse_pieces given = {
        .size = size,
        .metadata_fd = metadata_fd,
        .starts = starts,
        .offsets = offsets,
        .lengths = lengths,
        .count = count,
    };
    if (node == NULL || !node->made_later || atomic_load(&node->pieces) != NULL || top == NULL ||
        !pieces_are_valid(&given, top->geometry.virtual_size)) {
        return -EINVAL;
    }
    struct fuse_pieces *pieces = malloc(sizeof *pieces);
    if (pieces == NULL) {
        return -ENOMEM;
    }
    *pieces = given;
    atomic_store(&node->pieces, pieces);
    return 0;
}

uint64_t fuse_node_size(const struct fuse_node *node)
{
    const struct fuse_pieces *pieces = atomic_load(&node->pieces);
    return pieces != NULL ? pieces->size : node->size;
}

/* The first piece that ends behind `at`. */
static size_t piece_at(const struct fuse_pieces *pieces, uint64_t at)
{
    size_t low = 0, high = pieces->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (pieces->starts[middle] + pieces->lengths[middle] <= at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

struct fuse_place fuse_place_of(const struct fuse_call *call)
{
    const struct fuse_pieces *pieces = atomic_load(&call->node->pieces);
    uint64_t at = call->offset + call->done, left = call->length - call->done;

    if (pieces == NULL) {
        return (struct fuse_place){.offset = call->node->start + at, .length = left};
    }
    size_t index = piece_at(pieces, at);
    uint64_t start = index < pieces->count ? pieces->starts[index] : pieces->size;
    if (at < start) {
        return (struct fuse_place){.offset = at, .length = minimum(left, start - at), .metadata = true};
    }
    uint64_t inside = at - start;
    return (struct fuse_place){
        .offset = pieces->offsets[index] + inside,
        .length = minimum(left, pieces->lengths[index] - inside),
    };
}

void fuse_read_metadata(struct fuse_call *call, const struct fuse_place *place)
{
    const struct fuse_pieces *pieces = atomic_load(&call->node->pieces);
    uint8_t *into = call->buffer->memory + BUFFER_DATA_AT + call->done;
    uint64_t done = 0;

    call->outcome = (tapfs_outcome){.status = TAPFS_DONE, .done = place->length};
    while (done < place->length) {
        ssize_t got = pread(pieces->metadata_fd, into + done, place->length - done, (off_t)(place->offset + done));
        if (got == 0) {
            /* Behind its last metadata the image is zeros. */
            memset(into + done, 0, place->length - done);
            return;
        }
        if (got < 0 && errno != EINTR) {
            call->outcome = (tapfs_outcome){
                .status = TAPFS_FAILED, .error = errno, .layer = UINT32_MAX, .done = done, .operation = "read"};
            return;
        }
        done += got > 0 ? (uint64_t)got : 0;
    }
}
