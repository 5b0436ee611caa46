"""Whether OpenAI's own Python client is served by `fourfold serve` as by OpenAI: models, completions, chats, streams, errors.

usage: check_serve.py path/to/fourfold [MINUTES]
Serves the embedded base that `fourfold quickstart` is made of with the shipped adapters, and asks it with the `openai` package;
whole answers, streams and `fourfold generate` must agree. With MINUTES, 64 clients then ask for so long, with malformed requests,
clients that hang up and adapters that come and go among them; every answer is compared, and the server's memory is to stay flat.
One line a check; exit code 1 if any failed.
"""

import concurrent.futures
import http.client
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import openai

root = pathlib.Path(__file__).resolve().parents[2]
base = root / "src/quickstart/assets/base"
adapters = root / "adapters/quickstart"
failures = []


def report(what, good, note=""):
    print(f"{'ok  ' if good else 'FAIL'} {what}{': ' + str(note) if note and not good else ''}", flush=True)
    if not good:
        failures.append(what)


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    except Exception as error:  # the wrong kind of error is a failed check
        return print(f"     {type(error).__name__}: {error}")
    return None


def check(binary, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k3y", max_retries=0)
    names = [model.id for model in client.models.list()]
    report("models are listed", names == ["base", "actor", "reward", "sft"], names)

    question = "How was the soup at the Blue Door?"
    messages = [{"role": "user", "content": question}]
    command = [binary, "generate", "--base", base, "--adapter", adapters / "actor", "--prompt", question]
    done = subprocess.run([*command, "--seed", "5", "--json", "--device", "cpu"], capture_output=True, text=True, check=True)
    want = json.loads(done.stdout)
    chat = client.chat.completions.create(
        model="actor", messages=messages, seed=5, max_completion_tokens=128, logprobs=True, top_logprobs=2
    )
    choice = chat.choices[0]
    report("a chat is the command's response", choice.message.content == want["text"], choice.message.content)
    found = [entry.logprob for entry in choice.logprobs.content]
    report("its log-probabilities are the command's", max(abs(a - b) for a, b in zip(found, want["logprobs"], strict=True)) < 1e-5)
    report("usage counts tokens", (chat.usage.prompt_tokens, chat.usage.completion_tokens)
           == (len(want["prompt_token_ids"]), len(want["token_ids"])), chat.usage)
    stream = client.chat.completions.create(
        model="actor", messages=messages, seed=5, max_completion_tokens=128, stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    report("a streamed chat adds up to it", text == want["text"] and chunks[-1].usage == chat.usage, text)
    report("it ends for the same reason", chunks[-2].choices[0].finish_reason == choice.finish_reason == want["finish_reason"])

    ids = want["prompt_token_ids"]
    answer = client.completions.create(
        model="actor", prompt=ids, seed=5, max_tokens=128, logprobs=1, extra_body={"return_token_ids": True, "top_k": -1}
    )
    report("a completion by ids is the same response", answer.choices[0].token_ids == want["token_ids"])
    answer = client.completions.create(model="base", prompt=["The soup", "A room"], n=2, max_tokens=5, temperature=0)
    report("several prompts and responses", [choice.index for choice in answer.choices] == [0, 1, 2, 3]
           and answer.choices[0].text == answer.choices[1].text)
    parts = client.completions.create(model="base", prompt="The soup", max_tokens=5, temperature=0, stream=True)
    report("a streamed completion", "".join(part.choices[0].text for part in parts) == answer.choices[0].text)
    cut = client.completions.create(model="base", prompt="The soup", max_tokens=5, temperature=0, stop=[answer.choices[0].text[2:4]])
    report("a stop string", cut.choices[0].text == answer.choices[0].text[:2] and cut.choices[0].finish_reason == "stop", cut)

    error = refused(openai.NotFoundError, lambda: client.completions.create(model="nobody", prompt="a"))
    report("an unknown model is NotFoundError", error is not None and error.code == "model_not_found")
    error = refused(openai.BadRequestError, lambda: client.completions.create(model="base", prompt="a", presence_penalty=1))
    report("an unsupported parameter is BadRequestError", error is not None and error.param == "presence_penalty")
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0)
    report("a wrong key is AuthenticationError", refused(openai.AuthenticationError, stranger.models.list) is not None)

    load = {"lora_name": "new", "lora_path": str(adapters / "sft")}
    client.post("/load_lora_adapter", body=load, cast_to=str)
    of = lambda name: client.completions.create(model=name, prompt=ids, seed=1, max_tokens=30).choices[0].text
    report("an adapter loaded at run time", of("new") == of("sft"))
    error = refused(openai.BadRequestError, lambda: client.post("/load_lora_adapter", body=load, cast_to=str))
    report("its name is taken then", error is not None and "already" in str(error))
    client.post("/unload_lora_adapter", body={"lora_name": "new"}, cast_to=str)
    report("and free after unloading", refused(openai.NotFoundError, lambda: of("new")) is not None)

    def one(i):
        kind = {"model": ["base", "actor", "sft"][i % 3], "prompt": ids, "seed": i % 7, "max_tokens": 40}
        if i % 2:
            return "".join(part.choices[0].text for part in client.completions.create(**kind, stream=True))
        return client.completions.create(**kind).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(one, range(256)))
    alone = [one(i) for i in range(42)]
    # Which model, seed and kind a request has repeats after 42.
    report("256 requests of 64 clients", all(together[i] == alone[i % 42] for i in range(256)))


def resident(pid):
    """MiB of a process that lie in memory."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def soak(url, pid, seconds):
    host = url.removeprefix("http://")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k3y"}
    cases = [
        {"model": model, "prompt": f"The soup {seed}", "seed": seed, "max_tokens": 20 + seed, "temperature": [1.0, 0.0][seed % 2]}
        for model in ("base", "actor", "sft") for seed in range(6)
    ]

    def ask(connection, path, body):
        connection.request("POST", path, body if isinstance(body, str) else json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def text(reply):
        return json.loads(reply)["choices"][0]["text"]

    def streamed(reply):
        lines = [line[6:] for line in reply.decode().split("\n\n") if line.startswith("data: {")]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    one = http.client.HTTPConnection(host)
    want = [text(ask(one, "/v1/completions", case)[1]) for case in cases]
    end, begun = time.monotonic() + seconds, time.monotonic()

    def client(number):
        draw, connection, answered, wrong = random.Random(number), http.client.HTTPConnection(host, timeout=120), 0, 0
        while time.monotonic() < end:
            kind, which = draw.random(), draw.randrange(len(cases))
            if kind < 0.4:
                status, reply = ask(connection, "/v1/completions", cases[which])
                good = status == 200 and text(reply) == want[which]
            elif kind < 0.7:
                status, reply = ask(connection, "/v1/completions", {**cases[which], "stream": True})
                good = status == 200 and streamed(reply) == want[which]
            elif kind < 0.8:
                bad = ["{", "[]", '{"prompt": 5}', '{"prompt": "a", "n": -1}', '{"prompt": "a", "echo": true}', "\x00"]
                good = ask(connection, "/v1/completions", draw.choice(bad))[0] == 400
            elif kind < 0.9:
                gone = http.client.HTTPConnection(host, timeout=120)
                body = {**cases[which], "max_tokens": 200, "ignore_eos": True, "n": 4, "stream": draw.random() < 0.5}
                gone.request("POST", "/v1/completions", json.dumps(body), headers)
                time.sleep(draw.random() / 20)
                gone.close()
                good = True
            else:
                name = f"v{number}-{answered}"
                load = {"lora_name": name, "lora_path": str(adapters / "actor")}
                of_actor = which % 6 + 6
                good = ask(connection, "/v1/load_lora_adapter", load)[0] == 200
                status, reply = ask(connection, "/v1/completions", {**cases[of_actor], "model": name})
                good &= status == 200 and text(reply) == want[of_actor]
                good &= ask(connection, "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
            answered, wrong = answered + 1, wrong + (not good)
        return answered, wrong

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        running = [pool.submit(client, number) for number in range(64)]
        time.sleep(seconds / 3)
        early = resident(pid)
        counts = [one.result() for one in running]
    time.sleep(1)
    late = resident(pid)
    answered, wrong = (sum(column) for column in zip(*counts))
    rate = answered / (time.monotonic() - begun)
    print(f"     {answered} requests of 64 clients, {rate:.0f} a second; {early:.0f} MiB after a third of the time, {late:.0f} at the end")
    report("every one of them is answered as it should be", wrong == 0, wrong)
    report("memory stays flat", late < 1.1 * early + 10, f"{early:.0f} and {late:.0f} MiB")
    # The server has closed a connection that was idle for so long.
    one = http.client.HTTPConnection(host)
    one.request("GET", "/health")
    health = json.loads(one.getresponse().read())
    report("nothing is left running", (health["running"], health["waiting"]) == (0, 0), health)


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    options = [f"--adapter={name}={adapters / name}" for name in ("actor", "reward", "sft")]
    words = [binary, "serve", "--base", str(base), "--served-model-name", "base", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(
        [*words, "--api-key-env", "SERVE_KEY", *options], stderr=subprocess.PIPE, text=True, env={**os.environ, "SERVE_KEY": "k3y"}
    )
    try:
        line = server.stderr.readline()
        url = re.search(r"http://\S+", line)
        assert url, line
        check(binary, url.group())
        if len(sys.argv) > 2:
            soak(url.group(), server.pid, 60 * float(sys.argv[2]))
    finally:
        server.terminate()
        _, said = server.communicate(timeout=60)
    report("SIGTERM ends it", server.returncode == 0, said)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
