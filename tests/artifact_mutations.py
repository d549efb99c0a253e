"Damaged and hostile variants of an artifact, for the tests (and, with PGOLF_MUTATIONS=100000, for a long night)"
import copy
import hashlib
import zlib

import brotli

from pgolf.pack.container import MAGIC, PREAMBLE, open_header, seal

HOSTILE = [0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**53, 10**30, -10**30, 0.5, -0.0, 1e308, True, False, None, '', 'ans', 'pickle', 'lzma',
           'fp32', 'codes', '../../etc/passwd', '\x00', 'a' * 5000, [], {}, [[]], [2**31 - 1] * 4, [2**16, 2**16], [1] * 50, {'a': {'b': {}}}]


def flip(data, rng):
    "A few bits"
    out = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        out[rng.integers(len(out))] ^= 1 << rng.integers(8)
    return bytes(out)


def cut(data, rng):
    "The end, the beginning or the middle is gone"
    a, b = sorted(rng.integers(0, len(data) + 1, 2))
    return [data[:a], data[b:], data[:a] + data[b:]][rng.integers(3)]


def splice(data, rng):
    "A piece of it, or noise, somewhere it does not belong"
    a, b, at = (*sorted(rng.integers(0, len(data), 2)), rng.integers(len(data)))
    piece = data[a:b] if rng.random() < 0.5 else rng.bytes(int(rng.integers(1, 200)))
    return data[:at] + piece + data[at + (len(piece) if rng.random() < 0.5 else 0):]


def paths(node, path=()):
    "Every place in a JSON value"
    yield path
    for key in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
        yield from paths(node[key], (*path, key))


def lie(data, rng):
    "A header that says something else, under a valid checksum"
    header, payload = open_header(data)
    header, payload = copy.deepcopy(header), bytes(payload)
    for _ in range(rng.integers(1, 4)):
        places = [p for p in paths(header) if p]
        *way, key = places[rng.integers(len(places))]
        node = header
        for k in way: node = node[k]
        kind, other = rng.integers(5), places[rng.integers(len(places))]
        if kind < 2: node[key] = copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])
        elif kind == 2: del node[key]
        elif kind == 3 and isinstance(node[key], int): node[key] = int(node[key]) + int(rng.integers(-3, 4))
        else:
            value = header
            for k in other: value = value[k] if isinstance(value, (dict, list)) and (k in value if isinstance(value, dict) else k < len(value)) else value
            node[key] = copy.deepcopy(value)
    return seal(header, payload)


def forge(data, rng):
    "Damaged weights under a valid checksum of the file, sometimes with the table adjusted"
    header, payload = open_header(data)
    payload = [flip, cut, splice][rng.integers(3)](bytes(payload), rng)
    blobs = header['blobs']
    if rng.random() < 0.7: blobs[rng.integers(len(blobs))]['size'] += len(payload) - sum(b['size'] for b in blobs)
    return seal(header, payload)


def frame(data, rng):
    "A header that is no header: bombs, depth, wrong versions"
    _, payload = open_header(data)
    text = [b'[' * 200_000, b'0' * 2**20 + b'0', b'{"blobs":' + b'9' * 9000 + b'}', b'\xff\xfe', b'{}', b'null', b'[1,2', b'{"model":NaN}', rng.bytes(50),
            bytes(4 * 2**20)][rng.integers(10)]
    version = int(rng.integers(2, 4)) if rng.random() < 0.8 else int(rng.integers(2**16))
    squeeze = zlib.compress if version == 2 else lambda text: brotli.compress(text, quality=4, lgwin=int(rng.integers(10, 25)))
    body = squeeze(text) if rng.random() < 0.9 else text
    length = len(body) if rng.random() < 0.8 else int(rng.integers(2**32))
    rest = body + bytes(payload)
    return PREAMBLE.pack(MAGIC, version, length, hashlib.sha256(rest).digest()) + rest


MUTATIONS = {'flip': flip, 'cut': cut, 'splice': splice, 'lie': lie, 'forge': forge, 'frame': frame}
