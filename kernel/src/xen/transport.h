/*
 * The transport: what a backend needs of Xen, which is grants and an event channel. It has two implementations, the
 * kernel's devices (/dev/xen/gntdev, /dev/xen/evtchn) and a simulated machine in a directory, which
 * tests and benchmarks use (tests/xen/machine.py writes one).
 *
 * Threads: map, unmap and copy may be called from any thread at once; a channel belongs to one thread,
 * but notify may be called from any.
 */
#ifndef TAPFS_XEN_TRANSPORT_H
#define TAPFS_XEN_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define XEN_PAGE 4096u
/* The unit of offsets and lengths in requests. */
#define XEN_SECTOR_BYTES 512u

struct xen_transport;
struct xen_channel;

/* Pages of the frontend, one after the other in our memory. */
struct xen_mapping {
    uint8_t *memory;
    uint32_t pages;
    uint64_t handle; /* the transport's */
};

/* One piece of a page of the frontend and its place in our memory. */
struct xen_copy {
    uint8_t *local;
    uint32_t reference;
    uint16_t offset, length; /* within the page */
    int error;               /* the result: 0 or an errno */
    bool may_vanish;         /* `local` is a mapping of a file that somebody may shorten: EFAULT then, for others, too */
};

/* `machine`: NULL for the real one. NULL with errno set. */
struct xen_transport *xen_transport_open(const char *machine, uint32_t domain);
void xen_transport_close(struct xen_transport *transport);

/* Map pages, all or none. 0 or an errno (EACCES, EINVAL: not granted so; EFAULT). Thread-safe. */
int xen_map(struct xen_transport *transport, const uint32_t *references, uint32_t count, bool writable,
            struct xen_mapping *mapping);
void xen_unmap(struct xen_transport *transport, struct xen_mapping *mapping);

/* Copy each piece, to the frontend or from it. 0, or the errno of the first that failed; the others are done. */
int xen_copy(struct xen_transport *transport, struct xen_copy *pieces, size_t count, bool to_frontend);

/* Bind the frontend's port. NULL with errno set. */
struct xen_channel *xen_bind(struct xen_transport *transport, uint32_t port);
void xen_unbind(struct xen_channel *channel);
/* Becomes readable when the frontend has notified us. */
int xen_channel_fd(const struct xen_channel *channel);
/* Take what has been notified and be open for the next; before the ring is looked at. */
void xen_channel_clear(struct xen_channel *channel);
void xen_notify(struct xen_channel *channel);

/* ---- xen/grants.c: pages that stay mapped while the frontend keeps granting them ("feature-persistent") */

struct xen_grants;

/* NULL when out of memory. At most `limit` pages stay mapped, the least recently used go. */
struct xen_grants *xen_grants_new(struct xen_transport *transport, uint32_t limit);
/* No page may be held. */
void xen_grants_free(struct xen_grants *grants);
/*
 * Hold `count` pages: memory[i] is the page of references[i]. 0 or an errno; then none is held. One page may be held
 * many times at once. A page that was mapped for reading and is asked for writing is mapped anew.
 */
int xen_grants_hold(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable,
                    uint8_t **memory);
void xen_grants_release(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable);

#endif
