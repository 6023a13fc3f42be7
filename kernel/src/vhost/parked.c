/* Parked requests as the owner's threads see them: taken, given back to be tried again, completed. */
#include <errno.h>

#include "vhost/internal.h"

static struct vhost_request *request_of(struct parked_entry *entry)
{
    return (struct vhost_request *)(void *)entry;
}

static bool moves_data(const struct vhost_request *request)
{
    return request->kind == TAPFS_VHOST_READ || request->kind == TAPFS_VHOST_WRITE;
}

static void describe(const struct parked_entry *entry, tapfs_parked *parked)
{
    const struct vhost_request *request = (const void *)entry;
    *parked = (tapfs_parked){.ticket = entry->ticket, .request = request->kind};
    if (moves_data(request)) {
        uint64_t done = request->move.outcome.done;
        parked->offset = request->move.offset + done;
        parked->length = request->move.length - done;
        parked->outcome = request->move.outcome;
        parked->tried = request->tried;
        if (request->gathered.iov_base != NULL) {
            parked->data = (const uint8_t *)request->gathered.iov_base + done;
        }
    } else if (request->kind != TAPFS_VHOST_SYNC) {
        parked->offset = request->ranges[request->range].offset;
        parked->length = request->ranges[request->range].length;
    }
}

size_t tapfs_vhost_next_parked(tapfs_vhost *device, uint32_t queue, tapfs_parked *parked, size_t capacity)
{
    return park_next_described(&device->park, queue, parked, capacity, describe);
}

int tapfs_vhost_resume_parked(tapfs_vhost *device, uint64_t ticket, tapfs_parked *parked)
{
    struct vhost_request *request = request_of(park_taken(&device->park, ticket, true));
    (void)parked;
    if (request != NULL) {
        /* Its ring has the mover, which waits for the host without keeping this thread from the maps of others. */
        request->goes_on = moves_data(request);
        request->error = request->goes_on ? 0 : EINVAL;
        vhost_request_return(request);
    }
    return 0;
}

int tapfs_vhost_leave_parked(tapfs_vhost *device, uint64_t ticket)
{
    /* Nobody but the thread that took it touches it. */
    struct vhost_request *request = request_of(park_taken(&device->park, ticket, false));
    if (request == NULL) {
        return 1;
    }
    if (!atomic_load(&request->queue->stopping)) {
        return 0;
    }
    park_taken(&device->park, ticket, true);
    request->left = true;
    request->goes_on = false;
    request->error = EIO;
    vhost_request_return(request);
    return 1;
}

void tapfs_vhost_complete(tapfs_vhost *device, uint64_t ticket, int error)
{
    struct vhost_request *request = request_of(park_taken(&device->park, ticket, true));
    if (request != NULL) {
        /* A READ that was not moved to its end has nothing to be answered with. */
        request->error = error == 0 && request->kind == TAPFS_VHOST_READ ? EIO : error;
        request->goes_on = false;
        vhost_request_return(request);
    }
}
