# A guest in a boot sector: it writes its disk and reads it back until its memory is not what it has read, and says so.
#
# Turn number N writes a sector that holds N, at 64 + N % 256, and reads it into the page N % 64 of 64 pages from 0x10000
# on. Only the disk writes into these. Then each of the 64 pages must hold the last N that was read there. After each
# turn the guest says "." on the debug console (port 0xe9), "E" if a page holds something else, "D" if the disk fails.
# SeaBIOS gives it INT 13h, which is a virtio disk here.

        .intel_syntax noprefix
        .code16
        .set COUNTER, 0x600
        .set BUFFER, 0x800
        .set PAGES, 0x1000

        xor ax, ax
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov sp, 0x7000
        mov [drive], dl
        mov dword ptr [COUNTER], 0

turn:   mov eax, [COUNTER]
        mov [BUFFER], eax
        and eax, 255
        add eax, 64
        mov [sector], eax
        mov word ptr [place], BUFFER
        mov word ptr [page], 0
        mov ax, 0x4300
        call disk

        mov ax, [COUNTER]
        and ax, 63
        shl ax, 8
        add ax, PAGES
        mov [page], ax
        mov word ptr [place], 0
        mov ax, 0x4200
        call disk

        # Page BX holds the last N with N % 64 = BX, which is COUNTER - (COUNTER - BX) % 64, unless none has come there.
        xor ebx, ebx
look:   mov eax, [COUNTER]
        sub eax, ebx
        and eax, 63
        mov ecx, [COUNTER]
        sub ecx, eax
        jb next
        mov ax, bx
        shl ax, 8
        add ax, PAGES
        mov es, ax
        cmp ecx, es:[0]
        mov al, 'E'
        jne stop
next:   inc bx
        cmp bx, 64
        jb look

        mov al, '.'
        out 0xe9, al
        inc dword ptr [COUNTER]
        jmp turn

disk:   mov si, offset packet
        mov dl, [drive]
        int 0x13
        mov al, 'D'
        jc stop
        ret

stop:   out 0xe9, al
        hlt
        jmp stop

drive:  .byte 0
packet: .byte 16, 0
        .word 1
place:  .word 0
page:   .word 0
sector: .quad 0

        .org 510
        .byte 0x55, 0xaa
