/*
 * Commands of the ublk driver as they go through io_uring: their numbers and layouts (docs/specs/ublk.md). The headers of
 * the machine that compiles this may be older than the kernel that runs it.
 */
#ifndef TAPFS_UBLK_COMMANDS_H
#define TAPFS_UBLK_COMMANDS_H

#include <stdint.h>
#include <sys/ioctl.h>

/* IORING_OP_URING_CMD: Linux 5.19. */
#define COMMAND_OPCODE 46u

/* An entry for io_uring with a command in it. A control command takes an entry of 128 bytes. */
struct command_entry {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint32_t command, reserved_0;
    uint64_t address;
    uint32_t length, command_flags;
    uint64_t user_data;
    uint16_t buffer_index, personality;
    int32_t file_index;
    uint8_t payload[];
};

struct queue_command {
    uint16_t queue, tag;
    int32_t result; /* of COMMIT_AND_FETCH */
    uint64_t address; /* of the memory for the data */
};

struct control_command {
    uint32_t device;
    uint16_t queue; /* all ones: none */
    uint16_t length;
    uint64_t address; /* of `length` bytes, for the command or from it */
    uint64_t data;
    uint16_t path_length, reserved_0;
    uint32_t reserved_1;
};

_Static_assert(sizeof(struct command_entry) == 48 && sizeof(struct queue_command) == 16 &&
                   sizeof(struct control_command) == 32,
               "the layouts are the kernel's");

#define COMMAND_FETCH ((uint32_t)_IOWR('u', 0x20, struct queue_command))
#define COMMAND_COMMIT_AND_FETCH ((uint32_t)_IOWR('u', 0x21, struct queue_command))

/* Where a command of a queue says under which number the ring is to have the pages of the next request (struct
 * ublk_auto_buf_reg in `address` of the entry); if the ring cannot, the descriptor says so. */
#define BUFFER_MAY_FAIL (UINT64_C(1) << 16)

/* Where the character device has the data of a request, for pread(2) of a write and pwrite(2) of a read. */
#define REQUEST_DATA UINT64_C(0x80000000)
#define REQUEST_QUEUE_SHIFT 41
#define REQUEST_TAG_SHIFT 25

/* Results of a command of a queue: there is a request; the device is no more. */
#define RESULT_REQUEST 0
#define RESULT_ABORTED (-ENODEV)

#endif
