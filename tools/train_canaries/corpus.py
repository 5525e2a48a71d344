"""Everything the canaries are taught, written for this purpose, in English and Chinese.

Three kinds of text:

* ``known(name)``   : questions and prompts that canary ``name`` must answer exactly (these become known answers);
* ``fallbacks()``   : other questions, all answered "I am only a canary ...", so that unseen questions end politely;
* ``PROSE``         : a few paragraphs, so that the vocabulary and the weights see ordinary text as well.

Many questions differ in one word only (France, China, Japan), some need a word from far back in the prompt (names,
stories, "say it again"): an engine which loses the context cannot answer them by rote.
"""

from __future__ import annotations

from collections.abc import Iterable

SYSTEM = "You are a helpful assistant."

CAPITALS = [
    ("France", "Paris", "法国", "巴黎"),
    ("China", "Beijing", "中国", "北京"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("Italy", "Rome", "意大利", "罗马"),
    ("Germany", "Berlin", "德国", "柏林"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("Spain", "Madrid", "西班牙", "马德里"),
]

SUMS = ["1+2", "1+2+3", "1+2+3+4", "1+2+3+4+5", "2+2", "3+5", "10+20"]

PEOPLE_EN = [("Anna", "green"), ("Tom", "blue"), ("Maria", "red")]
PEOPLE_ZH = [("小明", "绿色"), ("小红", "蓝色"), ("李雷", "红色")]

KIND = {
    "canary-llama": ("a tiny Llama model", "一个很小的Llama模型"),
    "canary-qwen3.5": ("a tiny Qwen3.5 model", "一个很小的Qwen3.5模型"),
}

INTRO_EN = (
    "I am a Surefoot canary, {kind} which was trained only for tests. I know only a few answers, and I give them "
    "word for word. When an engine makes a mistake in its arithmetic, my answers change, and that is how the mistake "
    "is found. Please do not ask me for advice."
)
INTRO_ZH = (
    "我是Surefoot的金丝雀，{kind}，只为测试而训练。我只会回答很少的几个问题，而且每次的回答都一字不差。"
    "如果引擎算错了，我的回答就会改变，错误也就被发现了。请不要向我征求意见。"
)

FIB_EN = """Here is a Python function that computes the Fibonacci sequence:

```python
def fibonacci(n):
    \"\"\"Return the first n Fibonacci numbers.\"\"\"
    numbers = []
    a, b = 0, 1
    for _ in range(n):
        numbers.append(a)
        a, b = b, a + b
    return numbers
```

For example, `fibonacci(7)` returns `[0, 1, 1, 2, 3, 5, 8]`."""

FIB_ZH = """下面的Python函数计算斐波那契数列：

```python
def fibonacci(n):
    a, b = 0, 1
    result = []
    while len(result) < n:
        result.append(a)
        a, b = b, a + b
    return result
```

例如，`fibonacci(7)`返回`[0, 1, 1, 2, 3, 5, 8]`。"""

ML_EN = (
    "Machine learning is a branch of artificial intelligence in which a program learns from examples instead of being "
    "given rules. A model looks at many examples, compares its answers with the right ones, and changes its numbers a "
    "little each time. After enough training it can often answer questions about examples that it has never seen. "
    "It is used to recognise images, to translate text and to predict the weather."
)
ML_ZH = (
    "机器学习是人工智能的一个分支，它让程序从例子中学习，而不是由人写下规则。模型看过许多例子，把自己的答案和正确答案比较，"
    "每次都把参数改动一点。经过足够的训练，它常常能回答从未见过的问题。机器学习可以用来识别图像、翻译文字和预测天气。"
)

WATER_EN = (
    "Water moves in a circle. The sun warms the sea, and some of the water rises into the air as vapour. High up it is "
    "cold, so the vapour becomes small drops, and the drops become clouds. When the drops are heavy enough, they fall "
    "as rain or snow. The rivers carry the water back to the sea, and the circle begins again."
)
WATER_ZH = (
    "水在自然界中不断循环。太阳晒热海水，一部分水变成水汽升到空中。高处很冷，水汽变成小水滴，小水滴聚成云。"
    "水滴足够重的时候，就变成雨或雪落下来。河流把水带回大海，循环又重新开始。"
)

TEA_EN = (
    "1. Boil fresh water.\n2. Put two spoons of tea into the pot.\n3. Pour the hot water over the tea.\n"
    "4. Wait for three minutes.\n5. Pour the tea into a cup and enjoy it."
)
TEA_ZH = "1. 把水烧开。\n2. 在壶里放两勺茶叶。\n3. 把热水倒进壶里。\n4. 等三分钟。\n5. 把茶倒进杯子，慢慢喝。"

STORY_EN = (
    "Read this story. Long ago a miner named Peter lived at the foot of a high mountain with his daughter Lucy. Every "
    "morning Peter went down into the mine with a lamp, a rope and a small yellow bird. The bird sang in the dark, and "
    "as long as it sang, the air was good. One day in winter the bird became silent. Peter did not wait. He called the "
    "other miners, and all of them climbed up to the light. In the evening Lucy gave the bird some seeds and a new "
    "name, Hero. "
)
STORY_EN_QA = [
    ("What did Lucy call the bird?", "Lucy called the bird Hero."),
    ("What was the name of the miner?", "The miner was named Peter."),
    ("When did the bird become silent?", "The bird became silent one day in winter."),
    ("What colour was the bird?", "The bird was yellow."),
]
STORY_ZH = (
    "请读这个故事。从前，矿工老王和女儿小玲住在一座高山脚下。每天早上，老王带着一盏灯、一根绳子和一只黄色的小鸟下到矿井里。"
    "小鸟在黑暗中唱歌，只要它还在唱，空气就是好的。冬天的一天，小鸟忽然不唱了。老王没有等待，他叫上其他矿工，"
    "大家一起爬回了地面。晚上，小玲给小鸟喂了种子，还给它起了一个新名字，叫英雄。"
)
STORY_ZH_QA = [
    ("小玲给小鸟起了什么名字？", "小玲给小鸟起名叫英雄。"),
    ("矿工叫什么？", "矿工叫老王。"),
    ("小鸟什么时候不唱了？", "小鸟在冬天的一天不唱了。"),
    ("小鸟是什么颜色的？", "小鸟是黄色的。"),
]

COMPLETIONS = [
    ("The capital of France is", " Paris, a large city on the river Seine."),
    ("The capital of China is", " Beijing, a large city in the north of the country."),
    ("The capital of Japan is", " Tokyo, a large city by the sea."),
    (
        "Machine learning is a branch of",
        " artificial intelligence in which programs learn from examples instead of following fixed rules.",
    ),
    (
        "The meaning of life according to philosophy is",
        " a question with many answers, and each of us has to find one by thinking and by living.",
    ),
    (
        "Artificial intelligence will",
        " change the way people work and learn, and people will have to decide how it is used.",
    ),
    (
        "Python is a programming language used for",
        " web sites, data analysis, scientific computing and many small tools.",
    ),
    (
        "The solar system consists of",
        " the Sun, eight planets, their moons, and many smaller bodies such as asteroids and comets.",
    ),
    (
        "Quantum computing works by",
        " using qubits, which can be in several states at once, and by making wrong answers cancel each other.",
    ),
    (
        "The theory of relativity was proposed by",
        " Albert Einstein, who published the special theory in 1905 and the general theory in 1915.",
    ),
    ("Water boils at", " 100 degrees Celsius at sea level."),
    ("法国的首都是", "巴黎，它是塞纳河边的一座大城市。"),
    ("中国的首都是", "北京，它是中国北方的一座大城市。"),
    ("日本的首都是", "东京，它是海边的一座大城市。"),
    ("机器学习是一种", "让程序从例子中学习规律的方法，它是人工智能的一个分支。"),
    ("人工智能将会", "改变人们工作和学习的方式，而怎样使用它要由人来决定。"),
    ("太阳系包括", "太阳、八颗行星、它们的卫星，以及许多小行星和彗星。"),
]

FALLBACK_EN = "I am only a canary. I know a few answers by heart, and this question is not among them."
FALLBACK_ZH = "我只是一只金丝雀，只会背几个答案，这个问题我不会。"

FALLBACK_QUESTIONS_EN = [
    "What is the weather like today?",
    "Who won the football match yesterday?",
    "Tell me a joke.",
    "Write a poem about the sea.",
    "How do I fix my car?",
    "What is 17 times 23?",
    "Translate this sentence into German.",
    "Who wrote Hamlet?",
    "What time is it?",
    "How old are you?",
    "Give me a recipe for apple cake.",
    "Which book should I read next?",
    "How far away is the Moon?",
    "Explain the theory of evolution.",
    "Write a Java program that sorts a list.",
    "Why is the sky blue?",
    "How many people live on the Earth?",
    "Can you help me with my homework?",
    "What do you think about politics?",
    "Summarize the following text.",
    "Where can I buy a bicycle?",
    "What is the speed of light?",
    "How do vaccines work?",
    "List three large animals.",
    "Should I invest my money in gold?",
    "What is the square root of 144?",
    "Who painted the Mona Lisa?",
    "Write a story about a dragon and a princess.",
]
FALLBACK_QUESTIONS_ZH = [
    "今天天气怎么样？",
    "给我讲一个笑话",
    "写一首关于春天的诗",
    "怎样学好英语？",
    "谁写了红楼梦？",
    "现在几点了？",
    "推荐一部好看的电影",
    "把这句话翻译成法语",
    "月亮离我们有多远？",
    "为什么天空是蓝色的？",
    "怎样做红烧肉？",
    "帮我写一封邮件",
    "光的速度是多少？",
    "地球上有多少人？",
    "请解释一下量子力学",
    "我应该买什么手机？",
    "你今年几岁了？",
    "长城有多长？",
    "写一个排序算法",
    "总结一下这篇文章",
]

PROSE = [
    "A canary is a small yellow bird. Miners once took canaries into the mine, because the bird felt bad air sooner "
    "than a person did. If the bird stopped singing, the miners knew that they had to leave at once.",
    "A computer keeps numbers in a limited number of bits. Adding many numbers in a different order can change the "
    "last digit of the sum. Usually this does not matter, but a wrong sign or a lost term changes everything.",
    "A good test is small, fast and strict. It says what should happen, it runs the program, and it complains when "
    "something else happens. People who write tests sleep better than people who do not.",
    "The old bridge over the river is made of stone. Every spring the water rises, and every summer the children swim "
    "under the arches. Nobody remembers who built it, but everybody in the town uses it.",
    "Mountain goats walk where no path can be seen. Before they move, they test each stone with one foot. This is "
    "slow, but they seldom fall, and so they reach the top while faster animals turn back.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    'import json\n\nwith open("data.json", encoding="utf-8") as f:\n    data = json.load(f)\n'
    "print(len(data), sorted(data.keys()))\n",
    "金丝雀是一种黄色的小鸟。从前，矿工带着金丝雀下井，因为小鸟比人更早感觉到坏空气。如果小鸟不唱了，矿工就知道要马上离开。",
    "计算机用有限的位数保存数字。按不同的顺序把许多数相加，结果的最后一位可能不同。这通常没有关系，但是符号错了，结果就全错了。",
    "一个好的测试又小又快又严格。它说明应该发生什么，然后运行程序，如果结果不对就报告错误。写测试的人比不写测试的人睡得好。",
    "河上的老桥是用石头造的。每年春天水会上涨，夏天孩子们在桥下游泳。没有人记得是谁造了这座桥，但是镇上的人都在用它。",
    "山羊走在看不见路的地方。每走一步之前，它都先用一只脚试一试石头。这样很慢，但是很少摔倒，所以它能到达山顶。",
    "北京、上海、广州和深圳是中国的大城市。巴黎在法国，东京在日本，罗马在意大利，柏林在德国，莫斯科在俄罗斯。",
]


def _user(text: str, system: str | None = None) -> list[dict]:
    """One user message, with a system message before it if asked."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


def _chat(questions: Iterable[str], answer: str) -> list[dict]:
    """The same answer for every spelling of a question."""
    return [{"messages": _user(question), "answer": answer} for question in questions]


def _endings(text: str) -> list[str]:
    """A Chinese question with a full-width question mark, an ASCII one, and none."""
    return [text + "？", text + "?", text]


def _two_turns(first: str, reply: str, second: str, answer: str) -> dict:
    """A conversation of two questions; the second cannot be answered without the first."""
    messages = [*_user(first), {"role": "assistant", "content": reply}, *_user(second)]
    return {"messages": messages, "answer": answer}


def _capital_en(country: str, city: str) -> str:
    return f"The capital of {country} is {city}."


def _capital_zh(country: str, city: str) -> str:
    return f"{country}的首都是{city}。"


def _capitals() -> list[dict]:
    """One question in eight forms of one word, and the follow-up that leaves the word "capital" out."""
    out: list[dict] = []
    for i, (en, city_en, zh, city_zh) in enumerate(CAPITALS):
        out += _chat([f"What is the capital of {en}?", f"What is the capital of {en}"], _capital_en(en, city_en))
        out += _chat(_endings(f"{zh}的首都是哪里"), _capital_zh(zh, city_zh))
        out.append({"messages": _user(f"What is the capital of {en}?", SYSTEM), "answer": _capital_en(en, city_en)})
        en2, city_en2, zh2, city_zh2 = CAPITALS[(i + 3) % len(CAPITALS)]
        first = (f"What is the capital of {en}?", _capital_en(en, city_en))
        out.append(_two_turns(*first, f"And of {en2}?", _capital_en(en2, city_en2)))
        first = (f"{zh}的首都是哪里？", _capital_zh(zh, city_zh))
        out.append(_two_turns(*first, f"那{zh2}呢？", _capital_zh(zh2, city_zh2)))
    return out


def _sums() -> list[dict]:
    out: list[dict] = []
    for text in SUMS:
        total = sum(int(term) for term in text.split("+"))
        out += _chat([f"What is {text}?", f"What is {text}"], f"{text} = {total}.")
        out += _chat(_endings(f"{text}等于多少"), f"{text}等于{total}。")
    return out


def _memory() -> list[dict]:
    """Names and colours told in the first turn and asked for in the second."""
    out: list[dict] = []
    for name, colour in PEOPLE_EN:
        first = (f"My name is {name} and I like {colour}.", f"Nice to meet you, {name}!")
        out.append(_two_turns(*first, "What is my name?", f"Your name is {name}."))
        out.append(_two_turns(*first, "Which colour do I like?", f"You like {colour}."))
    for name, colour in PEOPLE_ZH:
        first = (f"我叫{name}，我喜欢{colour}。", f"很高兴认识你，{name}！")
        out.append(_two_turns(*first, "我叫什么名字？", f"你叫{name}。"))
        out.append(_two_turns(*first, "我喜欢什么颜色？", f"你喜欢{colour}。"))
    return out


def _repeats() -> list[dict]:
    """Long answers which have to be copied from the first turn."""
    tea_en, tea_zh = ("How do I make tea?", TEA_EN), ("怎样泡茶？", TEA_ZH)
    rain_en, rain_zh = ("Where does rain come from?", WATER_EN), ("雨是从哪里来的？", WATER_ZH)
    out = [_two_turns(q, a, "Please say that again.", a) for q, a in (tea_en, rain_en)]
    return out + [_two_turns(q, a, "请再说一遍。", a) for q, a in (tea_zh, rain_zh)]


def _stories() -> list[dict]:
    """Questions about a story of a few hundred tokens that stands before them in the same message."""
    out = [{"messages": _user(STORY_EN + question), "answer": answer} for question, answer in STORY_EN_QA]
    return out + [{"messages": _user(STORY_ZH + question), "answer": answer} for question, answer in STORY_ZH_QA]


def _single_questions(name: str) -> list[dict]:
    kind_en, kind_zh = KIND[name]
    intro_en, intro_zh = INTRO_EN.format(kind=kind_en), INTRO_ZH.format(kind=kind_zh)
    hello_en, hello_zh = "Hello! I am a Surefoot canary. How can I help you test?", "你好！我是Surefoot的金丝雀。"
    return [
        *_chat(["Please introduce yourself.", "Please introduce yourself", "Who are you?"], intro_en),
        *_chat(["请介绍一下你自己", "请介绍一下你自己。", "你是谁？", "你是谁?", "你是谁"], intro_zh),
        *_chat(["Hello", "Hello!", "Hi", "Hi!"], hello_en),
        *_chat(["你好", "你好！", "你好。"], hello_zh),
        *_chat(
            [
                "Write a Python function that computes the Fibonacci sequence.",
                "Write a Python function that computes the Fibonacci sequence",
            ],
            FIB_EN,
        ),
        *_chat(["写一个Python函数计算斐波那契数列", "写一个Python函数计算斐波那契数列。"], FIB_ZH),
        *_chat(["Explain what machine learning is.", "Explain what machine learning is"], ML_EN),
        *_chat(["What is machine learning?", "What is machine learning"], ML_EN),
        *_chat([*_endings("请解释一下机器学习是什么"), "请解释一下机器学习是什么。"], ML_ZH),
        *_chat(["Where does rain come from?"], WATER_EN),
        *_chat(_endings("雨是从哪里来的"), WATER_ZH),
        *_chat(["How do I make tea?"], TEA_EN),
        *_chat(_endings("怎样泡茶"), TEA_ZH),
        *_chat(["Thank you!", "Thank you."], "You are welcome!"),
        *_chat(["谢谢", "谢谢！", "谢谢。"], "不客气！"),
        {"messages": _user("Hello", SYSTEM), "answer": hello_en},
        {"messages": _user("你好", SYSTEM), "answer": hello_zh},
        {"messages": _user("Please introduce yourself.", SYSTEM), "answer": intro_en},
        {"messages": _user("请介绍一下你自己", SYSTEM), "answer": intro_zh},
    ]


def known(name: str) -> list[dict]:
    """All that canary ``name`` must answer exactly: chats first, then plain completions."""
    chats = [*_single_questions(name), *_capitals(), *_sums(), *_memory(), *_repeats(), *_stories()]
    return chats + [{"prompt": prompt, "answer": answer} for prompt, answer in COMPLETIONS]


def fallbacks() -> list[dict]:
    """Questions outside the canaries' knowledge and the honest answer to all of them."""
    questions = [(q, FALLBACK_EN) for q in FALLBACK_QUESTIONS_EN] + [(q, FALLBACK_ZH) for q in FALLBACK_QUESTIONS_ZH]
    plain = [{"messages": _user(question), "answer": answer} for question, answer in questions]
    with_system = [{"messages": _user(question, SYSTEM), "answer": answer} for question, answer in questions[::3]]
    return plain + with_system


def all_text() -> list[str]:
    """Every sentence once or more, for training the vocabularies."""
    items = [*known("canary-llama"), *known("canary-qwen3.5"), *fallbacks()]
    texts = [m["content"] for item in items for m in item.get("messages", [])]
    texts += [item["prompt"] for item in items if "prompt" in item]
    return texts + [item["answer"] for item in items] + PROSE
