/* The data nodes of a server: windows of the disk, and files that are made of it later. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fuse/internal.h"

/* Nodes stand in the order of their inodes. */
static int add(tapfs_fuse *server, const struct fuse_node *node)
{
    struct fuse_node *nodes = realloc(server->nodes, (server->node_count + 1) * sizeof *nodes);
    if (nodes == NULL) {
        return -ENOMEM;
    }
    server->nodes = nodes;
    size_t at = server->node_count;
    while (at > 0 && nodes[at - 1].inode >= node->inode) {
        at--;
    }
    if (at < server->node_count && nodes[at].inode == node->inode) {
        return -EEXIST;
    }
    memmove(&nodes[at + 1], &nodes[at], (server->node_count - at) * sizeof *nodes);
    nodes[at] = *node;
    server->node_count++;
    return 0;
}

int tapfs_fuse_add_node(tapfs_fuse *server, uint64_t inode, uint64_t start, uint64_t size, int writable,
                        int backing_fd)
{
    const struct layer *top = disk_layer(server->disk, 0);
    uint64_t disk_size = top == NULL ? 0 : top->geometry.virtual_size;
    if (start > disk_size || size > disk_size - start) {
        return -ERANGE;
    }
    if (writable != 0 && !top->geometry.writable) {
        return -EROFS;
    }
    const struct fuse_node node = {
        .inode = inode, .start = start, .size = size, .writable = writable != 0, .backing_fd = backing_fd};
    int result = add(server, &node);
    if (result == 0) {
        server->writable = server->writable || writable != 0;
    }
    return result;
}

int tapfs_fuse_add_made_node(tapfs_fuse *server, uint64_t inode)
{
    const struct fuse_node node = {.inode = inode, .made_later = true, .backing_fd = -1};
    return add(server, &node);
}

struct fuse_node *fuse_find_node(tapfs_fuse *server, uint64_t inode)
{
    size_t low = 0, high = server->node_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (server->nodes[middle].inode < inode) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < server->node_count && server->nodes[low].inode == inode ? &server->nodes[low] : NULL;
}

void fuse_nodes_free(tapfs_fuse *server)
{
    for (size_t i = 0; i < server->node_count; i++) {
        free(atomic_load(&server->nodes[i].pieces));
    }
    free(server->nodes);
}
