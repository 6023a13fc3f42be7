/* The pages that a ring shares with its frontend: four indices, then the entries (Xen's io/ring.h). */
#include "xen/internal.h"

struct ring_indices *xen_ring_indices(const struct xen_ring *ring)
{
    return (struct ring_indices *)(void *)ring->mapping.memory;
}

uint8_t *xen_ring_slot(const struct xen_ring *ring, uint32_t index)
{
    return ring->mapping.memory + RING_ENTRIES_AT + (index & (ring->entries - 1)) * ring->device->layout->entry_bytes;
}

uint32_t xen_ring_responses(const struct xen_ring *ring)
{
    return atomic_load_explicit(&xen_ring_indices(ring)->responses_produced, memory_order_acquire);
}
