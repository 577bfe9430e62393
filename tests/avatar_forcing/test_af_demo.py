"""The live demo: messages, pacing and faults on a virtual clock, the server's refusals, and the page in a real browser."""

import asyncio
import contextlib
import json
import math
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing import demo
from papers10.avatar_forcing.model import AvatarForcingConfig, build_model
from papers10.core.random import generator

FLAGS = [
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1000,1000",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--disable-audio-output",
]
MODEL = build_model(AvatarForcingConfig.small(), seed=0)


class Session:
    """A stand-in for the generator: the avatar does what the user does, with a little noise of its own."""

    def __init__(self, model, reference, seed):
        self.closed = False
        self.reset(seed)

    def reset(self, seed):
        self.noise, self.seed = generator(seed % 2**31, "stand-in"), seed

    def step(self, avatar_audio, user_audio, user_motion):
        if self.closed:
            raise RuntimeError("step after close")
        motion = 0.9 * user_motion + 0.01 * torch.randn(user_motion.shape, generator=self.noise)
        return types.SimpleNamespace(motion=motion)

    def close(self):
        self.closed = True


class Portrait(demo.RenderedPortrait):
    """One pixel a parameter: fast, and what is drawn can be read back."""

    def __init__(self):
        self.reference = torch.zeros(1, 8)

    def frames(self, motion, params):
        values = torch.stack([motion, demo.to_motion(params)], 1).mul(20).add(128).clamp(0, 255).to(torch.uint8)
        return values[:, :, None, :, None].expand(-1, -1, 1, -1, 3).contiguous()


def make_host(clock=None, **options):
    options = {"session": Session, "portrait": Portrait(), "run": demo.run_inline, **options}
    return demo.ConversationHost(MODEL, clock=clock or demo.VirtualClock(), **options)


LISTENER = demo.Conversation(MODEL, Portrait(), session=Session)


class Client:
    """A client in the same process. `delay` is how long it takes to read a message."""

    def __init__(self, host, delay=0.0):
        self.host, self.delay, self.got, self.box, self.seq = host, delay, [], asyncio.Queue(), 0
        self.task = asyncio.ensure_future(host.converse(self._receive, self._send))

    async def _receive(self):
        message = await self.box.get()
        if message is None:
            raise demo.Disconnected
        return message

    async def _send(self, item):
        if self.delay:
            await self.host.clock.sleep_until(self.host.clock.now() + self.delay)
        self.got.append(item)

    def say(self, seq=None, kind="sliders", **values):
        self.seq = self.seq + 1 if seq is None else seq
        self.box.put_nowait(json.dumps({"type": kind, "seq": self.seq, **values}))

    def leave(self):
        self.box.put_nowait(None)

    @property
    def blocks(self):
        return [demo.unpack_block(item) for item in self.got if isinstance(item, bytes)]

    @property
    def answers(self):
        return [json.loads(item) for item in self.got if isinstance(item, str)]

    @property
    def counters(self):
        (conversation,) = self.host.live.values()
        return conversation.counters


def virtual(test):
    """Runs an async test on a virtual clock."""

    def wrapped(self):
        clock = demo.VirtualClock()
        clock.run(test(self, clock))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def sliders(**values):
    return json.dumps({"type": "sliders", "seq": 1, **values})


class TestMessages:
    @pytest.mark.parametrize(
        ("message", "words"),
        [
            ("", "expected JSON"),
            ("{", "expected JSON"),
            ("[" * 20_000, "expected JSON"),
            ("1" * 6000, "expected JSON"),
            ("[1]", "a JSON object with a type"),
            ('{"type": 3}', "a JSON object with a type"),
            ('{"type": "shout", "seq": 1}', "type: expected sliders, reset or ping, got 'shout'"),
            ('{"type": "sliders"}', "seq: expected a whole number"),
            ('{"type": "sliders", "seq": -1}', "seq"),
            ('{"type": "sliders", "seq": true}', "seq"),
            ('{"type": "sliders", "seq": 1e3}', "seq"),
            ('{"type": "sliders", "seq": 99999999999}', "seq"),
            (sliders(seen="x"), "seen"),
            (sliders(smile=2), r"smile: expected a number in \[0, 1\], got '2'"),
            (sliders(yaw=-1.01), "yaw"),
            (sliders(smile=True), "smile"),
            (sliders(smile=math.nan), "expected finite numbers, got NaN"),
            (sliders(smile=math.inf), "Infinity"),
            (sliders(nods=0.5), "nods"),
            (sliders(user_talks=1), "user_talks: expected true or false"),
            (sliders(smlie=1), "did you mean 'smile'"),
            ("x" * 70_000, "expected at most 65536 bytes, got 70000"),
            (b"", "at least 16 bytes"),
            (b"x" * 16, "expected a block AFC1"),
            (b"AFC1\x03" + bytes(11), "of kind 3"),
            (demo.pack_user("sound", np.zeros(6399), 1), "sound: expected 6400 rows"),
            (demo.pack_user("motion", np.zeros((10, 7)), 1), "motion: expected 10 rows in 336 bytes"),
            (demo.pack_user("motion", np.full((10, 8), np.nan), 1), "motion: expected finite"),
            (demo.pack_user("motion", np.full((10, 8), 9.0), 1), "motion: expected finite"),
            (demo.pack_user("motion", np.zeros((10, 8)), 2**32 - 1), "seq"),
        ],
    )
    def test_unreadable(self, message, words):
        with pytest.raises(demo.MessageError, match=words):
            demo.parse_message(message)

    def test_readable(self):
        found = demo.parse_message(sliders(seen=4, smile=0.5, nods=2, microphone=True))
        assert (found.kind, found.seq, found.seen) == ("sliders", 1, 4)
        assert found.value == demo.SliderState(smile=0.5, nods=2, microphone=True)
        assert demo.parse_message('{"type": "reset", "seq": 3}') == ("reset", 3, None, None)
        assert demo.parse_message('{"type": "ping", "echo": 1.5}').value == 1.5
        assert demo.parse_message('{"type": "ping", "echo": ["long"]}').value is None
        values = np.random.default_rng(0).normal(size=(10, 8)).clip(-3, 3).astype(np.float32)
        found = demo.parse_message(demo.pack_user("motion", values, 9, seen=0))
        assert (found.kind, found.seq, found.seen) == ("motion", 9, 0)
        np.testing.assert_array_equal(found.value, values)
        loud = demo.parse_message(demo.pack_user("sound", np.full(6400, 3.0), 1))
        assert loud.seen is None and loud.value.shape == (6400,) and float(loud.value.max()) == 1

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.text(max_size=60), st.binary(max_size=60), st.binary(max_size=40).map(lambda b: b"AFC1" + b),
                     st.dictionaries(st.sampled_from(["type", "seq", "seen", "smile", "nods", "idle", "x"]), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("sliders"))).map(json.dumps)))
    def test_anything_is_read_or_answered(self, message):
        conversation = LISTENER
        conversation.counters.clear()
        conversation._last, conversation._budget = None, 10
        answer = conversation.receive(message)
        assert answer is None or answer["type"] in ("error", "pong") and len(json.dumps(answer)) < 2000
        pong = answer is not None and answer["type"] == "pong"
        assert conversation.counters["malformed"] + conversation.counters["accepted"] + pong == 1

    @pytest.mark.parametrize(("kind", "values", "words"), [("smile", np.zeros(3), "kind"), ("sound", np.zeros(70_000), "rows")])
    def test_pack_refuses(self, kind, values, words):
        with pytest.raises(ValueError, match=words):
            demo.pack_user(kind, values, 1)

    def test_a_block_survives_the_way(self):
        block = demo.Conversation(MODEL, Portrait(), session=Session).step()
        about, frames = demo.unpack_block(block.pack(extra=[1, "é"]))
        assert torch.equal(frames, block.frames) and about["extra"] == [1, "é"] and about["block"] == 1
        assert np.shape(about["voice"]) == (10, 2) and set(about["timings"]) == {"features", "generate", "decode"}
        with pytest.raises(ValueError, match="AFB1"):
            demo.unpack_block(b"AFC1xxxx")


class TestUser:
    def test_a_slider_becomes_a_smooth_movement(self):
        face = demo.UserFace(seed=1)
        still = torch.zeros(10)
        before = face.block(demo.SliderState(idle=0), still)
        idle_gone = face.block(demo.SliderState(idle=0), still)
        moving = face.block(demo.SliderState(idle=0, smile=1, yaw=-1), still)
        after = face.block(demo.SliderState(idle=0, smile=1, yaw=-1), still)
        assert before.shape == (10, 8) and idle_gone.abs().max() == 0
        smile = torch.cat([moving, after])[:, 1]
        assert smile[-1] == 1 and bool((smile.diff() >= 0).all()) and smile.diff().max() < 0.2
        assert float(after[-1, 4]) == -0.5

    def test_nods_are_counted_and_do_not_pile_up(self):
        face, still = demo.UserFace(), torch.zeros(10)
        pitch = [face.block(demo.SliderState(idle=0, nods=n), still)[:, 5] for n in (0, 1, 2, 2, 2, 3)]
        moved = [float(block.abs().max()) > 0.05 for block in pitch]
        assert moved == [False, True, True, True, False, True], "a nod lasts 25 frames; a second press in it adds nothing"

    def test_voice_opens_the_jaw(self):
        face = demo.UserFace()
        assert torch.allclose(face.block(demo.SliderState(idle=0), torch.full((10,), 0.5))[:, 0], torch.full((10,), 0.45))

    def test_speech_goes_on_where_it_stopped(self):
        rows = torch.arange(14.0)[:, None].expand(14, 4) / 14
        track = demo.SpeechTrack(rows)
        first, pause, second = track.block(True, 10), track.block(False, 10), track.block(True, 10)
        assert torch.equal(torch.cat([first[:, 0], second[:4, 0]]), rows[:, 0]) and pause[:, 0].abs().max() == 0
        assert torch.equal(rows, torch.arange(14.0)[:, None].expand(14, 4) / 14), "the track's own rows are not written to"
        assert float(pause[0, 1]) == -float(first[-1, 0]), "the difference knows of the end"
        spoken = demo.SpeechTrack(seed=3)
        loud = torch.cat([spoken.block(True, 10)[:, 0] for _ in range(10)])
        assert 0.2 < float(loud.mean()) < 0.7 and float(loud.max()) <= 1
        with pytest.raises(ValueError, match="features"):
            demo.SpeechTrack(torch.zeros(3, 5))

    def test_speech_of_a_recording(self):
        from papers10.avatar_forcing.data import synthesize

        wave = torch.from_numpy(synthesize(np.r_[np.zeros(10), np.ones(10)], np.zeros(20)))
        track = demo.SpeechTrack.from_wave(wave)
        loud = torch.cat([track.block(True, 10), track.block(True, 10)])[:, 0]
        assert float(loud[:9].max()) < 0.2 and float(loud[12:].min()) > 0.5
        with pytest.raises(ValueError, match="wave"):
            demo.SpeechTrack.from_wave(torch.zeros(10))


class TestConversation:
    def test_counts(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session, max_messages=6)
        for seq in (5, 6, 9, 9, 7):
            assert c.receive(json.dumps({"type": "sliders", "seq": seq, "smile": seq / 10})) is None
        assert c.receive("nonsense")["type"] == "error" and c.receive("nonsense") is None
        assert dict(+c.counters) == {"received": 7, "accepted": 3, "superseded": 2, "lost": 2, "out_of_order": 2, "malformed": 1, "flooded": 1}
        block = c.step()
        assert block.seq == 9 and float(block.params[-1, 1]) == pytest.approx(0.9)
        assert c.step().seq is None and c.counters["held_frames"] == 10

    def test_late_and_impossible(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session, max_lag=2)
        for _ in range(4):
            c.step()
        assert c.receive(sliders(seen=1)) is None and c.counters["late"] == 1
        assert "seen: expected at most 4, got 5" in c.receive(json.dumps({"type": "sliders", "seq": 2, "seen": 5}))["reason"]
        c.receive(json.dumps({"type": "sliders", "seq": 3, "seen": 2}))
        assert c.counters["accepted"] == 1

    def test_measured_motion_is_used_and_held(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session)
        values = np.linspace(-1, 1, 80).reshape(10, 8).astype(np.float32)
        c.receive(demo.pack_user("motion", values, 1))
        first, held = c.step(), c.step()
        np.testing.assert_array_equal(first.params, values)
        np.testing.assert_array_equal(held.params, np.repeat(values[-1:], 10, 0))
        assert c.counters["held_frames"] == 10
        c.receive(json.dumps({"type": "sliders", "seq": 2, "idle": 0}))
        c.step()
        assert c.step().params.abs().max() == 0, "sliders take over again"

    def test_sound_opens_the_users_jaw_and_silence_closes_it(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session)
        wave = 0.3 * np.sin(2 * np.pi * 150 * np.arange(6400) / 16000)
        jaws = []
        for k in range(4):
            c.receive(json.dumps({"type": "sliders", "seq": 2 * k, "microphone": True, "idle": 0}))
            if k < 2:
                c.receive(demo.pack_user("sound", wave, 2 * k + 1))
            jaws.append(float(c.step().params[5:, 0].mean()))
        assert min(jaws[:2]) > 0.1 and max(jaws[2:]) < 0.05

    def test_reset_takes_new_noise(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session)
        seed = c.session.seed
        c.receive('{"type": "reset", "seq": 1}')
        c.step()
        assert c.session.seed != seed

    def test_nothing_grows(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session)
        for k in range(400):
            for _ in range(3):
                c.receive(json.dumps({"type": "sliders", "seq": c.counters["accepted"], "smile": 0.5}))
            if k % 10 == 0:
                c.step()
        assert len(c._slots) <= 1 and len(c.timings) <= 250 and c.counters["superseded"] + c.counters["flooded"] > 1000

    def test_motion_that_is_not_finite_is_an_error(self):
        c = demo.Conversation(MODEL, Portrait(), session=Session)
        c.session.step = lambda *_: types.SimpleNamespace(motion=torch.full((1, 10, 8), math.nan))
        with pytest.raises(FloatingPointError, match="not finite"):
            c.step()

    def test_models_of_other_widths_are_refused(self):
        with pytest.raises(ValueError, match="motion_dim 8 and audio_features 4, got 8 and 40"):
            demo.Conversation(build_model(AvatarForcingConfig.small(audio_features=40)), Portrait(), session=Session)


class TestPacing:
    @virtual
    async def test_a_block_every_period(self, clock):
        client = Client(make_host(clock))
        await clock.advance(0.39)
        assert client.answers == [{"type": "welcome", "client": 1, "fps": 25.0, "block_size": 10, "synthetic": True}]
        assert not client.blocks
        await clock.advance(0.02)
        assert len(client.blocks) == 1
        await clock.advance(4.0)
        assert [about["block"] for about, _ in client.blocks] == list(range(1, 12))
        client.leave()
        await clock.advance(0)
        assert await client.task == "left" and client.host.live == {}

    @virtual
    async def test_ten_minutes_do_not_drift(self, clock):
        client = Client(make_host(clock))
        await clock.advance(600.001)
        assert len(client.blocks) == 1500 and client.counters["skipped_blocks"] == 0
        client.leave()
        await clock.advance(0)

    @virtual
    async def test_the_newest_state_is_used(self, clock):
        client = Client(make_host(clock))
        await clock.advance(0.1)
        for smile in (0.2, 0.9, 0.4):
            client.say(smile=smile, idle=0)
        await clock.advance(0.4)
        about, frames = client.blocks[0]
        assert about["seq"] == 3 and int(frames[-1, 1, 0, 1, 0]) == int(0.4 / 0.25 * 20 + 128)
        client.leave()
        await clock.advance(0)

    @virtual
    async def test_ticks_that_are_missed_are_skipped(self, clock):
        spent = [0.1, 0.9, 0.1, 0.1]

        async def slow(function, *arguments):
            await clock.sleep_until(clock.now() + (spent.pop(0) if spent else 0.0))
            return function(*arguments)

        client = Client(make_host(clock, run=slow))
        when = []
        for _ in range(30):
            before = len(client.blocks)
            await clock.advance(0.1)
            when += [round(clock.now(), 1)] * (len(client.blocks) - before)
        # Ticks at 0.4, 0.8, 1.2, ...: the second block takes until 1.7, so those at 1.2 and 1.6 are skipped.
        assert when[:4] == [0.5, 1.7, 2.1, 2.5] and client.counters["skipped_blocks"] == 2
        client.leave()
        await clock.advance(0)

    @virtual
    async def test_a_slow_client_loses_old_blocks_and_nothing_piles_up(self, clock):
        client = Client(make_host(clock), delay=1.0)
        await clock.advance(20.05)
        numbers = [about["block"] for about, _ in client.blocks]
        made, dropped = client.counters["blocks"], client.counters["dropped_frames"] // 10
        assert made == 50 and 15 <= len(numbers) <= 20 and numbers == sorted(set(numbers))
        assert made - dropped - len(numbers) <= 3, "at most two wait and one is on its way"
        assert made - numbers[-1] <= 5, "what arrives is recent"
        client.leave()
        await clock.advance(2)
        assert client.task.done()

    @virtual
    async def test_a_client_that_reads_nothing_is_given_up(self, clock):
        host = make_host(clock, send_timeout=3.0)
        client = Client(host, delay=1e6)
        await clock.advance(4)
        assert await client.task == "stalled" and host.stats()["clients"] == 0 and host.total["stalled"] == 1

    @virtual
    async def test_answers_are_bounded_too(self, clock):
        host = make_host(clock, send_timeout=100)
        client = Client(host, delay=5.0)
        for _ in range(50):
            client.box.put_nowait("nonsense")
        await clock.advance(30)
        assert len(client.answers) <= 9 and client.counters["malformed"] == 50
        client.leave()
        await clock.advance(0)


class TestHost:
    @virtual
    async def test_no_cross_talk(self, clock):
        def script(client, sign):
            client.say(yaw=sign * 0.5, idle=1.0, user_talks=sign > 0, avatar_talks=True)

        async def talk(signs):
            host = make_host(clock)
            clients = []
            for sign in signs:
                clients.append(Client(host) if sign else None)
                if sign is None:
                    host.total["clients"] += 1
                await clock.advance(0.05)
            for _ in range(5):
                for client, sign in zip(clients, signs, strict=True):
                    if client:
                        script(client, sign)
                await clock.advance(0.4)
            for client in filter(None, clients):
                client.leave()
            await clock.advance(0)
            return [client and torch.cat([frames for _, frames in client.blocks]) for client in clients]

        both, first, second = await talk([1, -1]), await talk([1, None]), await talk([None, -1])
        assert torch.equal(both[0], first[0]) and torch.equal(both[1], second[1])
        assert not torch.equal(both[0], both[1])

    @virtual
    async def test_clients_have_their_own_noise(self, clock):
        host = make_host(clock)
        one, two = host.new_conversation(1), host.new_conversation(2)
        assert one.session.seed != two.session.seed and host.new_conversation(1).session.seed == one.session.seed

    @virtual
    async def test_places(self, clock):
        host = make_host(clock, max_clients=2)
        clients = [Client(host) for _ in range(2)]
        await clock.advance(0.1)
        with pytest.raises(demo.HostFull, match="all 2 places"):
            await host.converse(clients[0]._receive, clients[0]._send)
        clients[0].leave()
        await clock.advance(0)
        third = Client(host)
        await clock.advance(0.5)
        assert len(third.blocks) == 1 and host.stats()["clients"] == 2
        for client in (clients[1], third):
            client.leave()
        await clock.advance(0)
        assert host.stats() == {"clients": 0, "max_clients": 2, "period": 0.4, "counters": host.stats()["counters"]}
        assert host.total["refused"] == 1 and host.total["left"] == 3

    @virtual
    async def test_one_failure_restarts_and_three_end_only_that_client(self, clock):
        host = make_host(clock)
        good, bad = Client(host), Client(host)
        await clock.advance(0.1)
        session = host.live[2].session
        working = session.step
        session.step = lambda *_: 1 / 0
        await clock.advance(0.4)
        session.step = working
        await clock.advance(0.4)
        assert len(bad.blocks) == 1 and "starts anew: ZeroDivisionError" in bad.answers[-1]["reason"]
        session.step = lambda *_: 1 / 0
        await clock.advance(2.0)
        assert await bad.task == "failed" and host.total["restarts"] == 4 and session.closed
        assert len(good.blocks) == 7
        good.leave()
        await clock.advance(0)

    @virtual
    async def test_leaving_during_a_write_and_twice(self, clock):
        host = make_host(clock)

        async def gone(_):
            raise demo.Disconnected

        client = Client(host)
        client._send = gone
        assert await host.converse(client._receive, gone) == "left"
        client.leave()
        await clock.advance(0)
        assert host.live == {}
        conversation = host.new_conversation()
        conversation.close(), conversation.close()

    def test_a_step_in_a_thread_is_waited_for(self):
        order = []

        class Slow(Session):
            def step(self, *streams):
                time.sleep(0.1)
                order.append("step")
                return super().step(*streams)

            def close(self):
                order.append("close")

        host = demo.ConversationHost(MODEL, session=Slow, portrait=Portrait(), clock=Fast())
        order.clear()

        async def talk():
            client = Client(host)
            await asyncio.sleep(0.03)
            client.leave()
            return await client.task

        assert asyncio.run(talk()) == "left" and order[-1] == "close" and order[0] == "step"
        host.close()

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"max_clients": 0}, "max_clients"), ({"queue_blocks": 0}, "queue_blocks"), ({"send_timeout": -1.0}, "send_timeout"), ({"portrait": "oil"}, "portrait: expected one of renderer, autoencoder"), ({"workers": 0}, "workers")],
    )
    def test_refusals(self, options, words):
        with pytest.raises(ValueError, match=words):
            make_host(**options)


class Fast(demo.WallClock):
    """Real time, 40 times faster."""

    def now(self):
        return 40 * time.monotonic()

    async def sleep_until(self, when):
        await asyncio.sleep(max(0.0, when - self.now()) / 40)


@pytest.fixture(scope="module")
def running():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    host = demo.ConversationHost(MODEL, session=Session, max_clients=2)
    with demo.serve(host, port=0, wait=False) as running:
        yield running


def talk_to(running, **options):
    client = pytest.importorskip("websockets.sync.client")
    return client.connect(running.url.replace("http", "ws") + "ws", max_size=2**22, **options)


class TestServer:
    def get(self, url, **headers):
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10)

    def test_page_and_health(self, running):
        answer = self.get(running.url)
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        assert running.url.startswith("http://127.0.0.1:") and "default-src 'none'" in policy
        assert text.count("synthetic") >= 2 and "src=" not in text.split("<script>")[0]
        assert json.load(self.get(running.url + "health"))["max_clients"] == 2

    @pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
    def test_foreign_names_and_pages_are_refused(self, running, headers):
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.get(running.url, **headers)
        assert refused.value.code == 403

    def test_a_foreign_page_cannot_talk(self, running):
        from websockets.exceptions import InvalidStatus

        with pytest.raises(InvalidStatus), talk_to(running, origin="http://evil.example"):
            pass
        with talk_to(running, origin=running.url.rstrip("/")) as socket:
            assert json.loads(socket.recv(timeout=10))["type"] == "welcome"

    def test_a_talk(self, running):
        with talk_to(running) as socket:
            assert json.loads(socket.recv(timeout=10))["type"] == "welcome"
            for bad in ("{", b"AFC1", b"x" * 100_000):
                socket.send(bad)
                assert json.loads(socket.recv(timeout=10))["type"] == "error"
            socket.send(sliders(smile=1.0))
            about, frames = demo.unpack_block(socket.recv(timeout=10))
            assert frames.shape == (10, 2, 64, 64, 3) and about["seq"] == 1 and about["counters"]["malformed"] == 3
            assert not torch.equal(frames[0, 1], frames[-1, 1]), "the user smiles"

    def test_too_many_are_refused_politely_and_places_come_free(self, running):
        from websockets.exceptions import ConnectionClosed

        deadline = time.monotonic() + 10
        while running.host.live and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                assert json.loads(stack.enter_context(talk_to(running)).recv(timeout=10))["type"] == "welcome"
            third = stack.enter_context(talk_to(running))
            assert json.loads(third.recv(timeout=10)) == {"type": "refused", "reason": "all 2 places are taken; try again later"}
            with pytest.raises(ConnectionClosed) as closed:
                third.recv(timeout=10)
            assert closed.value.rcvd.code == 1013
        while running.host.live and time.monotonic() < deadline + 10:
            time.sleep(0.01)
        with talk_to(running) as socket:
            assert json.loads(socket.recv(timeout=10))["type"] == "welcome"

    def test_huge_messages_end_the_talk_but_not_the_host(self, running):
        from websockets.exceptions import ConnectionClosed

        with talk_to(running) as socket:
            socket.recv(timeout=10)
            with pytest.raises(ConnectionClosed):
                socket.send(bytes(2**22))
                while True:
                    socket.recv(timeout=10)
        assert json.load(self.get(running.url + "health"))["max_clients"] == 2

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"host": "0.0.0.0"}, ValueError, "expected an address of this computer"),
            ({"host": "192.168.1.5"}, ValueError, "allow_remote"),
            ({"host": "evil.example"}, ValueError, "allow_remote"),
            ({"port": 70_000}, ValueError, "port"),
        ],
    )
    def test_refusals(self, options, error, words):
        with pytest.raises(error, match=words):
            demo.serve(make_host(), wait=False, **options)

    def test_a_port_that_is_taken(self, running):
        port = int(running.url.rsplit(":", 1)[1].strip("/"))
        with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be used"):
            demo.serve(make_host(), port=port, wait=False)

    def test_options_beside_a_host(self):
        pytest.importorskip("fastapi")
        with pytest.raises(ValueError, match="options: expected none beside a host, got seed"):
            demo.create_app(make_host(), seed=1)


@pytest.mark.browser
@pytest.mark.slow
class TestInChromium:
    def test_the_page(self, browser, running):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        def get(name):
            return browser.find_element(By.ID, name)

        def wait(condition):
            WebDriverWait(browser, 60).until(lambda _: condition())

        def colours(canvas):
            return browser.execute_script(f"const c = get('{canvas}'); return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")

        def total():
            return browser.execute_script("return total")

        browser.get_log("browser"), browser.get_log("performance")
        browser.get(running.url)
        wait(lambda: total() >= 1)
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert running.url in asked
        assert [url for url in asked if not url.startswith((running.url, "data:", "blob:", "chrome", "about:"))] == []
        browser.execute_cdp_cmd("Network.disable", {})  # The log would hold every picture of the talk.
        wait(lambda: total() >= 15)
        assert get("state").text == "connected"
        assert "frames a second" in get("rate").text
        browser.execute_script("for (const name of ['idle']) { get(name).value = 0; get(name).dispatchEvent(new Event('input')); }")
        before, count = np.array(colours("avatar")), total()
        assert before.reshape(64, 64, 4)[..., :3].std() > 10, "a face is drawn"
        browser.execute_script("get('smile').value = 1; get('smile').dispatchEvent(new Event('input'))")
        # The avatar's mouth moves when the user smiles; a still face differs by 3 at most.
        wait(lambda: np.abs(np.array(colours("avatar")) - before).reshape(64, 64, 4)[38:56, 16:48, :3].max() > 25)
        wait(lambda: total() >= count + 30)
        assert get("smile-value").text == "1.00"
        wait(lambda: " ms" in get("latency").text)
        assert "real-time factor" in get("host").text and get("problem").text == ""
        # The microphone of this browser is a beep.
        def click(name):
            browser.execute_script(f"get('{name}').click()")

        click("microphone")
        wait(lambda: browser.execute_script("return ears !== null") and any(c._ears is not None for c in running.host.live.values()))
        click("microphone")
        wait(lambda: browser.execute_script("return ears === null"))
        for name in ("avatar_talks", "sound", "nod", "neutral", "reset"):
            click(name)
        count = total()
        wait(lambda: total() >= count + 30)
        wait(lambda: any(c.restarts for c in running.host.live.values()))
        assert get("problem").text == "" and running.host.stats()["counters"].get("restarts", 0) == 0
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        # A lost connection is taken up again.
        client = next(iter(running.host.live))
        browser.execute_script("socket.close()")
        count = total()
        wait(lambda: total() >= count + 15)
        assert client not in running.host.live
        browser.get("about:blank")


class TestWidget:
    def test_it_plays_and_stops(self):
        pytest.importorskip("ipywidgets")
        host = demo.ConversationHost(MODEL, session=Session, clock=Fast())
        widget = demo.LiveWidget(host)
        widget.sliders["smile"].value = 1.0
        widget.start(), widget.start()
        deadline = time.monotonic() + 10
        while widget.painted < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert widget.painted >= 5 and len(host.live) == 1
        assert widget.avatar.value[:4] == b"\x89PNG" and "real-time factor" in widget.note.value
        widget.stop()
        assert widget.note.value == "stopped" and host.live == {}
        host.close()

    def test_a_rehearsed_talk_stands_in(self, capsys, monkeypatch):
        shown = []
        monkeypatch.setattr("IPython.display.display", shown.append)
        demo.live_widget(make_host(portrait="renderer"), live=False, seconds=0.8, max_bytes=400_000)
        assert [type(item).__name__ for item in shown] == ["InlineVideo"] and shown[0].shape[0] == 20

    def test_rehearsal(self):
        conversation = make_host().new_conversation()
        blocks = demo.rehearse(conversation, demo.small_talk, 2.0)
        assert [block.seq for block in blocks] == [1, 2, 3, 4, 5] and demo.side_by_side(blocks, 2).shape == (50, 2, 32, 3)
        assert float(blocks[2].params[-1, 1]) == 1.0
        with pytest.raises(ValueError, match="script: .*did you mean 'smile'"):
            demo.rehearse(make_host().new_conversation(), lambda t: {"smlie": 1}, 1)
