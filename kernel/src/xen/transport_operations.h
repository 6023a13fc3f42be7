/* The functions of an implementation of xen/transport.h. References, counts and bounds of a page are checked before. */
#ifndef TAPFS_XEN_TRANSPORT_OPERATIONS_H
#define TAPFS_XEN_TRANSPORT_OPERATIONS_H

#include "xen/transport.h"

struct xen_operations {
    void (*close)(struct xen_transport *transport);
    int (*map)(struct xen_transport *transport, const uint32_t *references, uint32_t count, bool writable,
               struct xen_mapping *mapping);
    void (*unmap)(struct xen_transport *transport, const struct xen_mapping *mapping);
    /* Sets the `error` of every piece whose `error` is 0, and skips the others. */
    void (*copy)(struct xen_transport *transport, struct xen_copy *pieces, size_t count, bool to_frontend);
    struct xen_channel *(*bind)(struct xen_transport *transport, uint32_t port);
    void (*unbind)(struct xen_channel *channel);
    void (*clear)(struct xen_channel *channel);
    void (*notify)(struct xen_channel *channel);
};

/* The first member of an implementation's own. */
struct xen_transport {
    const struct xen_operations *operations;
    uint32_t domain;
};

struct xen_channel {
    const struct xen_operations *operations;
    int fd; /* readable after a notification */
};

/* NULL with errno set. */
struct xen_transport *xen_gntdev_open(uint32_t domain);
struct xen_transport *xen_memory_open(const char *directory, uint32_t domain);

#endif
