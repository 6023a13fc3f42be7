/* Calls of xen/transport.h, passed on to one of its implementations. */
#include <errno.h>

#include "xen/transport_operations.h"

/* Xen's own numbers of domains begin here (DOMID_FIRST_RESERVED). */
#define DOMAINS_MAX 0x7ff0u

struct xen_transport *xen_transport_open(const char *machine, uint32_t domain)
{
    if (domain >= DOMAINS_MAX) {
        errno = EINVAL;
        return NULL;
    }
    return machine != NULL ? xen_memory_open(machine, domain) : xen_gntdev_open(domain);
}

void xen_transport_close(struct xen_transport *transport)
{
    transport->operations->close(transport);
}

int xen_map(struct xen_transport *transport, const uint32_t *references, uint32_t count, bool writable,
            struct xen_mapping *mapping)
{
    if (count == 0) {
        return EINVAL;
    }
    return transport->operations->map(transport, references, count, writable, mapping);
}

void xen_unmap(struct xen_transport *transport, struct xen_mapping *mapping)
{
    transport->operations->unmap(transport, mapping);
    *mapping = (struct xen_mapping){.memory = NULL};
}

int xen_copy(struct xen_transport *transport, struct xen_copy *pieces, size_t count, bool to_frontend)
{
    for (size_t i = 0; i < count; i++) {
        pieces[i].error = (uint32_t)pieces[i].offset + pieces[i].length > XEN_PAGE ? EINVAL : 0;
    }
    transport->operations->copy(transport, pieces, count, to_frontend);
    for (size_t i = 0; i < count; i++) {
        if (pieces[i].error != 0) {
            return pieces[i].error;
        }
    }
    return 0;
}

struct xen_channel *xen_bind(struct xen_transport *transport, uint32_t port)
{
    return transport->operations->bind(transport, port);
}

void xen_unbind(struct xen_channel *channel)
{
    channel->operations->unbind(channel);
}

int xen_channel_fd(const struct xen_channel *channel)
{
    return channel->fd;
}

void xen_channel_clear(struct xen_channel *channel)
{
    channel->operations->clear(channel);
}

void xen_notify(struct xen_channel *channel)
{
    channel->operations->notify(channel);
}
