/* Let a plain disk share what another disk has in host files, where the file system can: no byte is moved. */
#include <errno.h>

#include "engine/chain_walk.h"

#define CLONE_LOOKUPS 65536

struct clone_walk {
    struct walk walk; /* first, so that a walk is one of these */
    const struct layer *target;
    int error;
};

/* What is not there as it reads cannot be shared: packed, encrypted, or not fetched yet. */
static bool clone_run(struct walk *walk, const tapfs_mapped *run)
{
    struct clone_walk *clone = (struct clone_walk *)walk;
    const struct layer *target = clone->target, *source = walk->request.disk->layers[run->layer];

    if (run->kind == TAPFS_DATA && run->placed && !host_absent(source->files[run->file], run->host_offset, run->length)) {
        clone->error = host_clone(target->files[target->geometry.identity_file],
                                  target->geometry.identity_offset + run->offset, source->files[run->file],
                                  run->host_offset, run->length);
    } else if (run->kind == TAPFS_DATA || run->kind == TAPFS_COMPRESSED) {
        clone->error = EINVAL;
    }
    walk->request.position = run->offset + run->length;
    return clone->error == 0;
}

static bool can_be_shared_with(const struct layer *target)
{
    return target != NULL && target->geometry.writable && target->geometry.identity && target->cipher == NULL &&
           target->geometry.identity_file < target->file_count;
}

int tapfs_clone_ranges(tapfs_disk *target, tapfs_disk *source, const tapfs_range *ranges, size_t count)
{
    struct clone_walk clone = {
        .walk = {.take = clone_run, .lookups_left = CLONE_LOOKUPS}, .target = disk_layer(target, 0)};
    uint64_t size = clone.target == NULL ? 0 : clone.target->geometry.virtual_size;

    if (!can_be_shared_with(clone.target)) {
        return EOPNOTSUPP;
    }
    for (size_t i = 0; i < count; i++) {
        tapfs_outcome outcome;
        uint64_t end = ranges[i].offset + ranges[i].length;
        if (end > size) {
            return EINVAL;
        }
        walk_chain(&clone.walk, source, ranges[i].offset, ranges[i].length, &outcome);
        if (clone.error != 0 || clone.walk.request.position < end) {
            return clone.error != 0 ? clone.error : EINVAL;
        }
    }
    return 0;
}
