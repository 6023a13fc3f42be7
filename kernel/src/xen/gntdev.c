/*
 * Xen by the kernel's devices: /dev/xen/gntdev maps and copies what a frontend has granted, /dev/xen/evtchn is the
 * event channels. Their structures are in the kernel's own headers (linux-libc-dev).
 *
 * A frontend may take a grant back at any time, or name a grant that never was. Then the hypervisor refuses the page,
 * and the call gives an errno. A page that has been mapped stays until we unmap it, whatever the frontend does.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "xen/transport_operations.h"

/* The kernel's headers use Xen's names of these two, which Xen's own headers define. */
typedef uint32_t grant_ref_t;
typedef uint16_t domid_t;
#include <xen/evtchn.h>
#include <xen/gntdev.h>

_Static_assert(sizeof(struct ioctl_gntdev_map_grant_ref) == 24, "the kernel's layout");
_Static_assert(sizeof(struct ioctl_gntdev_unmap_grant_ref) == 16, "the kernel's layout");
_Static_assert(sizeof(struct gntdev_grant_copy_segment) == 24, "the kernel's layout");
_Static_assert(sizeof(struct ioctl_gntdev_grant_copy) == 16, "the kernel's layout");

/* Of a copy (xen/include/public/grant_table.h, GNTCOPY_* and GNTST_*). */
#define COPY_FROM_GRANT 1u
#define COPY_TO_GRANT 2u
#define STATUS_OKAY 0
#define STATUS_GENERAL_ERROR (-1)
#define STATUS_BAD_DOMAIN (-2)
#define STATUS_BAD_GRANT (-3)
#define STATUS_PERMISSION_DENIED (-8)
#define STATUS_BAD_PAGE (-9)
#define STATUS_BAD_COPY (-10)
#define STATUS_AGAIN (-12)

/* Pieces in one call: what fits on a thread's stack with ease. */
#define COPY_BATCH 128u
/* Pages in one call without asking for memory: a ring, or a request without indirect segments. */
#define MAP_SMALL 16u

struct gntdev_transport {
    struct xen_transport transport;
    int fd;
};

struct evtchn_channel {
    struct xen_channel channel; /* its fd: /dev/xen/evtchn with this one port */
    uint32_t port;              /* ours */
};

static int gntdev_fd(const struct xen_transport *transport)
{
    return ((const struct gntdev_transport *)transport)->fd;
}

static void gntdev_close(struct xen_transport *transport)
{
    close(gntdev_fd(transport));
    free(transport);
}

static void forget_grants(int fd, uint64_t index, uint32_t count)
{
    struct ioctl_gntdev_unmap_grant_ref unmap = {.index = index, .count = count};

    ioctl(fd, IOCTL_GNTDEV_UNMAP_GRANT_REF, &unmap);
}

/* The call with room for its references filled in. */
static int map_grants(int fd, uint32_t domain, const uint32_t *references, uint32_t count, bool writable,
                      struct ioctl_gntdev_map_grant_ref *call, struct xen_mapping *mapping)
{
    call->count = count;
    for (uint32_t i = 0; i < count; i++) {
        call->refs[i] = (struct ioctl_gntdev_grant_ref){.domid = domain, .ref = references[i]};
    }
    if (ioctl(fd, IOCTL_GNTDEV_MAP_GRANT_REF, call) < 0) {
        return errno;
    }
    /* Only now does the hypervisor see the references, and refuse what is not granted. */
    int protection = PROT_READ | (writable ? PROT_WRITE : 0);
    uint8_t *memory = mmap(NULL, (size_t)count * XEN_PAGE, protection, MAP_SHARED, fd, (off_t)call->index);
    if (memory == MAP_FAILED) {
        int error = errno;
        forget_grants(fd, call->index, count);
        return error;
    }
    *mapping = (struct xen_mapping){.memory = memory, .pages = count, .handle = call->index};
    return 0;
}

static int gntdev_map(struct xen_transport *transport, const uint32_t *references, uint32_t count, bool writable,
                      struct xen_mapping *mapping)
{
    union {
        struct ioctl_gntdev_map_grant_ref call;
        uint8_t room[sizeof(struct ioctl_gntdev_map_grant_ref) + MAP_SMALL * sizeof(struct ioctl_gntdev_grant_ref)];
    } small = {.call = {.count = 0}};
    struct ioctl_gntdev_map_grant_ref *call = &small.call;

    if (count > MAP_SMALL) {
        call = calloc(1, sizeof *call + (size_t)count * sizeof call->refs[0]);
        if (call == NULL) {
            return ENOMEM;
        }
    }
    int error = map_grants(gntdev_fd(transport), transport->domain, references, count, writable, call, mapping);
    if (call != &small.call) {
        free(call);
    }
    return error;
}

static void gntdev_unmap(struct xen_transport *transport, const struct xen_mapping *mapping)
{
    munmap(mapping->memory, (size_t)mapping->pages * XEN_PAGE);
    forget_grants(gntdev_fd(transport), mapping->handle, mapping->pages);
}

static int status_error(int16_t status)
{
    switch (status) {
    case STATUS_OKAY:
        return 0;
    case STATUS_BAD_DOMAIN:
        return ESRCH;
    case STATUS_BAD_GRANT:
    case STATUS_BAD_COPY:
        return EINVAL;
    case STATUS_PERMISSION_DENIED:
        return EACCES;
    case STATUS_BAD_PAGE:
        return EFAULT;
    case STATUS_AGAIN:
        return EAGAIN;
    default:
        return EIO;
    }
}

static struct gntdev_grant_copy_segment segment_of(const struct xen_copy *piece, uint32_t domain, bool to_frontend)
{
    struct gntdev_grant_copy_segment segment = {
        .len = piece->length,
        .flags = to_frontend ? COPY_TO_GRANT : COPY_FROM_GRANT,
        .status = STATUS_GENERAL_ERROR,
    };
    if (to_frontend) {
        segment.source.virt = piece->local;
        segment.dest.foreign.ref = piece->reference;
        segment.dest.foreign.offset = piece->offset;
        segment.dest.foreign.domid = (uint16_t)domain;
    } else {
        segment.source.foreign.ref = piece->reference;
        segment.source.foreign.offset = piece->offset;
        segment.source.foreign.domid = (uint16_t)domain;
        segment.dest.virt = piece->local;
    }
    return segment;
}

static void gntdev_copy(struct xen_transport *transport, struct xen_copy *pieces, size_t count, bool to_frontend)
{
    struct gntdev_grant_copy_segment segments[COPY_BATCH];
    struct xen_copy *batch[COPY_BATCH];

    for (size_t i = 0; i < count;) {
        struct ioctl_gntdev_grant_copy call = {.segments = segments};
        for (; i < count && call.count < COPY_BATCH; i++) {
            if (pieces[i].error == 0) {
                batch[call.count] = &pieces[i];
                segments[call.count++] = segment_of(&pieces[i], transport->domain, to_frontend);
            }
        }
        int failed = ioctl(gntdev_fd(transport), IOCTL_GNTDEV_GRANT_COPY, &call) < 0 ? errno : 0;
        for (uint32_t done = 0; done < call.count; done++) {
            batch[done]->error = failed != 0 ? failed : status_error(segments[done].status);
        }
    }
}

static struct xen_channel *evtchn_bind(struct xen_transport *transport, uint32_t port)
{
    struct ioctl_evtchn_bind_interdomain bind = {.remote_domain = transport->domain, .remote_port = port};
    struct evtchn_channel *channel = malloc(sizeof *channel);

    if (channel == NULL) {
        return NULL;
    }
    int fd = open("/dev/xen/evtchn", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    int ours = fd < 0 ? -1 : ioctl(fd, IOCTL_EVTCHN_BIND_INTERDOMAIN, &bind);
    if (ours < 0) {
        int error = errno;
        if (fd >= 0) {
            close(fd);
        }
        free(channel);
        errno = error;
        return NULL;
    }
    channel->channel = (struct xen_channel){.operations = transport->operations, .fd = fd};
    channel->port = (uint32_t)ours;
    return &channel->channel;
}

static uint32_t our_port(const struct xen_channel *channel)
{
    return ((const struct evtchn_channel *)channel)->port;
}

static void evtchn_unbind(struct xen_channel *channel)
{
    struct ioctl_evtchn_unbind unbind = {.port = our_port(channel)};

    ioctl(channel->fd, IOCTL_EVTCHN_UNBIND, &unbind);
    close(channel->fd);
    free(channel);
}

static void evtchn_clear(struct xen_channel *channel)
{
    uint32_t ports[16];
    ssize_t count;

    do {
        count = read(channel->fd, ports, sizeof ports);
    } while (count < 0 && errno == EINTR);
    /* The kernel keeps a port that it has reported masked until the number is written back. */
    while (count > 0 && write(channel->fd, ports, (size_t)count) < 0 && errno == EINTR) {
    }
}

static void evtchn_notify(struct xen_channel *channel)
{
    struct ioctl_evtchn_notify notify = {.port = our_port(channel)};

    ioctl(channel->fd, IOCTL_EVTCHN_NOTIFY, &notify);
}

static const struct xen_operations gntdev_operations = {
    .close = gntdev_close,
    .map = gntdev_map,
    .unmap = gntdev_unmap,
    .copy = gntdev_copy,
    .bind = evtchn_bind,
    .unbind = evtchn_unbind,
    .clear = evtchn_clear,
    .notify = evtchn_notify,
};

struct xen_transport *xen_gntdev_open(uint32_t domain)
{
    struct gntdev_transport *transport = malloc(sizeof *transport);

    if (transport == NULL) {
        return NULL;
    }
    int fd = open("/dev/xen/gntdev", O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        int error = errno;
        free(transport);
        errno = error;
        return NULL;
    }
    *transport = (struct gntdev_transport){.transport = {.operations = &gntdev_operations, .domain = domain}, .fd = fd};
    return &transport->transport;
}
