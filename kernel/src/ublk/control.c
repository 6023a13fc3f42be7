/* Commands for the driver's control device, one at a time: an io_uring of one entry for each. */
#include <linux/io_uring.h>

#include "ublk/commands.h"
#include "ublk/internal.h"

static const uint8_t OPERATIONS[] = {COMMAND_OPCODE};
static const struct io_rings_use USE = {.operations = OPERATIONS, .operation_count = sizeof OPERATIONS};

int tapfs_ublk_control(int control, uint32_t command, uint32_t device, void *buffer, uint16_t length, uint64_t data)
{
    struct io_rings rings;
    uint64_t tag;
    int32_t result;

    if (!io_rings_open(&rings, 1, IORING_SETUP_SQE128, &USE)) {
        return -errno;
    }
    struct command_entry *entry = io_rings_entry(&rings);
    entry->opcode = COMMAND_OPCODE;
    entry->fd = control;
    entry->command = command;
    *(struct control_command *)(void *)entry->payload = (struct control_command){
        .device = device,
        .queue = UINT16_MAX,
        .length = length,
        .address = (uintptr_t)buffer,
        .data = data,
    };
    int error = 0;
    while (!io_rings_next(&rings, &tag, &result)) {
        error = io_rings_wait(&rings, 0);
        if (error != 0 && error != EINTR && error != EAGAIN && error != EBUSY) {
            result = -error;
            break;
        }
    }
    io_rings_close(&rings);
    return result;
}
