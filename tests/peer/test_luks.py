"""LUKS both ways: bare containers and qcow2 images with QEMU 7.2 and 10, containers with cryptsetup."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tests.conftest import Ran
from tests.peer.newest_qemu import newest_qemu
from tests.peer.test_convert import MIB
from tests.qcow2_images import audit

Run = Callable[..., Ran]

SIZE = MIB + 512
KINDS = ("luks", "qcow2")
CREATORS = ("tapfs", "qemu")
PASSWORD = b"correct horse"
SECRET = ("--object", f"secret,id=s,data={PASSWORD.decode()}")

#: Ciphers in the words of qemu-img, as it makes them; it ends in an assertion for keys of 192 bits without XTS.
CIPHERS = {
    "default": "",
    "aes-128-cbc-essiv": "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "aes-192-xts": "cipher-alg=aes-192,hash-alg=sha1",
    "aes-256-ctr": "cipher-alg=aes-256,cipher-mode=ctr,hash-alg=sha512",
    "aes-256-ecb": "cipher-alg=aes-256,cipher-mode=ecb",
    "aes-128-xts-plain": "cipher-alg=aes-128,ivgen-alg=plain,hash-alg=sha384",
    "serpent-256-xts": "cipher-alg=serpent-256,hash-alg=ripemd160",
    "serpent-128-cbc": "cipher-alg=serpent-128,cipher-mode=cbc",
    "twofish-256-cbc-essiv": "cipher-alg=twofish-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "twofish-192-xts": "cipher-alg=twofish-192,hash-alg=sha224",
    "twofish-128-ctr": "cipher-alg=twofish-128,cipher-mode=ctr",
    "cast5-128-cbc": "cipher-alg=cast5-128,cipher-mode=cbc",
    "cast5-128-cbc-essiv": "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
}

#: The path of a program of QEMU by its name: the system's 7.2, and 10 of the backports.
QEMUS: dict[str, Callable[[str], str]] = {"system": str, "backports": newest_qemu}

#: Each cipher in one kind of image, made by one of the two and changed by one version of QEMU; the default in both.
TURNS = [
    *(("default", kind, creator, qemu) for kind in KINDS for creator, qemu in zip(CREATORS, QEMUS, strict=True)),
    *(
        (cipher, KINDS[number % 2], CREATORS[number // 2 % 2], list(QEMUS)[(number + number // 4) % 2])
        for number, cipher in enumerate(CIPHERS)
        if cipher != "default"
    ),
]


def ran(*words: object, data: bytes | None = None) -> str:
    """The output of a program, which must end well.

    On a busy machine QEMU, 7.2 and 10, may fail to measure itself for a new header: it is asked again.
    """
    for _ in range(20):
        done = subprocess.run(list(map(str, words)), input=data, capture_output=True, check=False)
        if b"Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.decode()


def options_of(cipher: str, kind: str, *more: str) -> str:
    """The -o text for a kind of image: qcow2 has a prefix before each word."""
    prefix = "encrypt." if kind == "qcow2" else ""
    words = [f"{prefix}{word}" for word in ("iter-time=10", *filter(None, CIPHERS[cipher].split(",")))]
    return ",".join([*words, *more])


def for_qemu(image: Path, kind: str) -> str:
    secret = "encrypt.format=luks,encrypt.key-secret=s" if kind == "qcow2" else "key-secret=s"
    return f"driver={kind},{secret},file.filename={image}"


def by_qemu(program: Callable[[str], str], image: Path, kind: str) -> bytes:
    raw = image.with_suffix(".raw")
    ran(program("qemu-img"), "convert", *SECRET, "--image-opts", for_qemu(image, kind), "-O", "raw", raw)
    return raw.read_bytes()


def change_by_qemu(program: Callable[[str], str], image: Path, kind: str, expected: bytearray, seed: int) -> None:
    choice, commands = random.Random(seed), []
    for _ in range(12):
        at = choice.randrange(SIZE // 512) * 512
        length = min(choice.randrange(1, 300) * 512, SIZE - at)
        fill = choice.randrange(256)
        commands += ["-c", f"write -P {fill} {at} {length}"]
        expected[at : at + length] = bytes([fill]) * length
    ran(program("qemu-io"), *SECRET, "--image-opts", for_qemu(image, kind), *commands)


def change_by_tapfs(image: Path, kind: str, expected: bytearray, seed: int) -> None:
    choice = random.Random(seed)
    with tapfs_package.open(image, format=kind, writable=True, password=PASSWORD) as disk:
        assert disk.read(0, disk.size) == expected
        for _ in range(30):
            at = choice.randrange(SIZE)
            length = min(choice.choice([1, 511, 5000, 90_000]), SIZE - at)
            if choice.random() < 0.7:
                data = choice.randbytes(length)
                disk.write(at, data)
            else:
                data = bytes(length)
                disk.write_zeroes(at, length)
            expected[at : at + length] = data
        assert disk.read(0, disk.size) == expected


@pytest.mark.parametrize(("cipher", "kind", "creator", "qemu"), TURNS)
def test_both_take_turns(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cipher: str, kind: str, creator: str, qemu: str
) -> None:
    monkeypatch.setenv("TAPFS_PASSWORD", PASSWORD.decode())
    program, image = QEMUS[qemu], tmp_path / "image"
    if creator == "qemu":
        secret = "encrypt.format=luks,encrypt.key-secret=s" if kind == "qcow2" else "key-secret=s"
        options = options_of(cipher, kind, secret)
        ran(program("qemu-img"), "create", "-q", *SECRET, "-f", kind, "-o", options, image, SIZE)
    else:
        assert tapfs("create", "-f", kind, "-o", options_of(cipher, kind), image, SIZE) == (0, "", "")
    if kind == "luks":  # a new container is noise
        ran(program("qemu-io"), *SECRET, "--image-opts", for_qemu(image, kind), "-c", f"write -P 0 0 {SIZE}")
    expected = bytearray(SIZE)
    change_by_qemu(program, image, kind, expected, 1)
    change_by_tapfs(image, kind, expected, 2)
    change_by_qemu(program, image, kind, expected, 3)
    change_by_tapfs(image, kind, expected, 4)
    assert by_qemu(program, image, kind) == expected
    if kind == "qcow2":
        ran(program("qemu-img"), "check", *SECRET, "--image-opts", for_qemu(image, kind))
        found = audit(image.read_bytes())
        assert (found.corruptions, found.leaks) == ([], [])


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512,compat=0.10",
        "cluster_size=2097152",
        "extended_l2=on,cluster_size=16384",
        "data_file=outside",
        "refcount_bits=1,cluster_size=1024",
    ],
)
def test_the_layouts_of_qcow2(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """IVs count the sectors of the host file, of the data file if there is one."""
    monkeypatch.setenv("TAPFS_PASSWORD", PASSWORD.decode())
    monkeypatch.chdir(tmp_path)
    program, expected = newest_qemu, bytearray(SIZE)
    words = ("-o", options_of("default", "qcow2", options))
    assert tapfs("create", "-f", "qcow2", *words, tmp_path / "image", SIZE) == (0, "", "")
    for turn in range(2):
        change_by_tapfs(tmp_path / "image", "qcow2", expected, turn)
        change_by_qemu(program, tmp_path / "image", "qcow2", expected, turn)
    assert by_qemu(program, tmp_path / "image", "qcow2") == expected
    change_by_tapfs(tmp_path / "image", "qcow2", expected, 9)


def test_an_overlay_and_its_snapshot(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that a snapshot shares are copied: read at one place of the file, written at another."""
    monkeypatch.setenv("TAPFS_PASSWORD", PASSWORD.decode())
    base, image = tmp_path / "base", tmp_path / "image"
    below = random.Random(1).randbytes(MIB // 2)
    base.write_bytes(below)
    words = ("-o", options_of("default", "qcow2"), "-b", base, "-F", "raw")
    assert tapfs("create", "-f", "qcow2", *words, image, SIZE) == (0, "", "")
    expected = bytearray(below.ljust(SIZE, b"\0"))
    change_by_tapfs(image, "qcow2", expected, 1)
    ran("qemu-img", "snapshot", *SECRET, "--image-opts", "-c", "kept", for_qemu(image, "qcow2"))
    kept = bytes(expected)
    change_by_tapfs(image, "qcow2", expected, 2)
    assert by_qemu(str, image, "qcow2") == expected
    assert tapfs("convert", "--snapshot", "kept", "-O", "raw", image, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == kept
    ran("qemu-img", "snapshot", *SECRET, "--image-opts", "-a", "kept", for_qemu(image, "qcow2"))
    change_by_tapfs(image, "qcow2", bytearray(kept), 3)


def test_the_old_encryption_of_qcow2_is_read(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AES-128 in CBC mode, IVs of the guest's sectors; never written."""
    image, out = tmp_path / "image", tmp_path / "out"
    options = "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s,file.filename="
    ran(
        "qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s", image, SIZE
    )
    ran(
        "qemu-io", *SECRET, "--image-opts", f"{options}{image}", "-c", "write -P 7 512k 100k", "-c", "write -P 9 64k 1k"
    )
    monkeypatch.setenv("TAPFS_PASSWORD", PASSWORD.decode())
    assert tapfs("convert", "-O", "raw", image, out) == (0, "", "")
    expected = bytearray(SIZE)
    expected[MIB // 2 : MIB // 2 + 102_400] = b"\7" * 102_400
    expected[65_536:66_560] = b"\x09" * 1024
    assert out.read_bytes() == expected
    assert tapfs("convert", "-n", "-f", "raw", "-O", "qcow2", out, image).code == 12


# -- cryptsetup -------------------------------------------------------------------------------------


#: Otherwise cryptsetup measures the processor for seconds.
QUICK = ("--pbkdf-force-iterations", "1000")


def cryptsetup(*words: object, password: bytes = PASSWORD) -> str:
    return ran("cryptsetup", "-q", "--key-file=-", *words, data=password)


@pytest.mark.parametrize(
    "words",
    [
        ("--pbkdf", "argon2id", "--sector-size", "4096"),
        ("--pbkdf", "argon2i", "--sector-size", "512", "-c", "aes-cbc-essiv:sha256", "-s", "256"),
        ("--pbkdf", "pbkdf2", "--hash", "sha512", "-c", "aes-xts-plain", "-s", "256"),
    ],
)
def test_what_cryptsetup_encrypts(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str]
) -> None:
    """`cryptsetup reencrypt --encrypt` needs no device mapper for a file, and encrypts what was in it."""
    image, out = tmp_path / "image", tmp_path / "out"
    plain = random.Random(words[1]).randbytes(2 * MIB)
    image.write_bytes(plain.ljust(34 * MIB, b"\0"))
    costs = ("--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4") if "argon2" in words[1] else QUICK
    offline = ("--encrypt", "--force-offline-reencrypt", "--reduce-device-size", "32M")
    cryptsetup("reencrypt", "--type", "luks2", *offline, *words, *costs, image)
    monkeypatch.setenv("TAPFS_PASSWORD", PASSWORD.decode())
    assert tapfs("convert", "-f", "luks", "-O", "raw", image, out) == (0, "", "")
    assert out.read_bytes()[: 2 * MIB] == plain
    change = random.Random(5).randbytes(5000)
    with tapfs_package.open(image, format="luks", writable=True, password=PASSWORD) as disk:
        disk.write(4096 + 17, change)
    # Decrypted by cryptsetup, with a header of its own file, the disk stands where the payload stood.
    cryptsetup("reencrypt", "--decrypt", "--force-offline-reencrypt", "--header", tmp_path / "header", image)
    assert image.read_bytes()[: 2 * MIB] == plain[: 4096 + 17] + change + plain[4096 + 17 + 5000 :]


@pytest.mark.parametrize("slot", [0, 5])
def test_passwords_of_several_slots(tmp_path: Path, slot: int) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(20 * MIB)
    cryptsetup("luksFormat", "--type", "luks1", *QUICK, image)
    (tmp_path / "other").write_bytes(b"another word")
    cryptsetup("luksAddKey", *QUICK, "-S", "5", image, tmp_path / "other")
    if slot == 5:
        cryptsetup("luksKillSlot", image, "0", password=b"another word")
    with tapfs_package.open(image, format="luks", password=b"another word" if slot == 5 else PASSWORD) as disk:
        assert len(disk.read(0, 512)) == 512


@pytest.mark.parametrize("cipher", ["default", "aes-128-cbc-essiv", "aes-256-ctr"])
def test_cryptsetup_opens_what_tapfs_makes(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cipher: str
) -> None:
    image = tmp_path / "image"
    monkeypatch.setenv("TAPFS_PASSWORD", PASSWORD.decode())
    assert tapfs("create", "-f", "luks", "-o", options_of(cipher, "luks"), image, SIZE) == (0, "", "")
    cryptsetup("open", "--test-passphrase", image)
    said = cryptsetup("luksDump", image)
    assert "Payload offset" in said
    done = subprocess.run(
        ["cryptsetup", "-q", "--key-file=-", "open", "--test-passphrase", image],
        input=b"wrong",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
