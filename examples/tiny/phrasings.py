"""How the questions are worded. ``[a|b]`` stands for either; ``{name}`` is filled in by make_corpus.py.

The computed kinds keep their operands in one order and side by side in every wording: what a small model learns about
sums in one wording then serves in all of them.
"""

PREFIXES = {
    "en": ["Please tell me: ", "Question: ", "Quick question: ", "Hi! "],
    "zh": ["请回答：", "请问，", "问题：", "你好，"],
}

# kind: language: {answer: patterns}
CHAT = {
    "greeting": {
        "en": {
            "Hello! How can I help you?": [
                "[Hello|Hi|Hey|Good morning|Good afternoon|Good evening|Greetings][| there| friend| again| to you]!",
                "[Nice|Good|Glad|Happy] to [meet|see] you[| today| again]!",
            ],
            "I am fine, thank you!": [
                "[How are you|How are you doing|How do you do|How is it going][| today| now| this morning]?",
                "[Are you|Are you feeling] [well|fine|good|okay][| today| now]?",
            ],
        },
        "zh": {
            "你好！有什么可以帮你？": [
                "[你好|您好|早上好|下午好|晚上好|嗨|大家好][|啊|呀|，朋友|，小助手]！",
                "[很高兴|真高兴|高兴][认识|见到][你|您]！",
            ],
            "我很好，谢谢！": ["[你|您|你今天|你最近|你现在][好吗|怎么样|过得好吗|过得怎么样|还好吗|感觉怎么样]？"],
        },
    },
    "identity": {
        "en": {
            "I am Tiny, a small assistant made by the lora_ms project.": [
                "[Who|What] are you[|, exactly|, really| anyway]?",
                "[Tell me|Can you tell me|Could you tell me|I want to know|May I know|Do you know] [who|what] you are.",
                "[|Please |Could you |Can you ]introduce yourself[| briefly| to me| in one sentence| to us].",
                "[|Please |Could you |Can you ][say|tell me] [something|a few words|a little|more] about yourself.",
                "[|Please |Can you ]describe yourself[| briefly| in one sentence| to me].",
                "[Who|What] am I [talking|speaking|chatting] [to|with][| now]?",
                "Are you [a|really a] [human|robot|person|machine|program|language model]?",
                "Are you [|really ][ChatGPT|GPT|Qwen|Llama|Claude|DeepSeek|Siri|Gemini]?",
                "[What kind of|Which|What] [assistant|model|AI|bot] are you?",
            ],
            "My name is Tiny.": [
                "What is your [|full |real |own |first ]name?",
                "What's your [|full |real |own ]name?",
                "[Tell me|Can you tell me|Could you tell me|I want to know|Please say|Say|Give me] your name.",
                "What [should|can|may|shall|do] I call you?",
                "How [should|can|may|shall] I [call|address|name] you?",
                "What do [people|they|others|your friends] call you?",
                "[Do you have|Have you got] a name?",
                "May I [know|ask|have] your name[|, please]?",
                "[Which|What] name do you [use|have|go by]?",
                "[What|Which] name [were you given|did they give you|do you answer to]?",
                "[What are you|How are you] called?",
                "Your name[|, please]?",
            ],
            "I was made by the lora_ms project.": [
                "Who [made|created|built|trained|developed|designed|wrote] you?",
                "[Tell me|Can you tell me|Do you know|I want to know] who [made|created|built|trained|developed] you.",
                "[Who is|Tell me|Who was] your [maker|creator|author|developer|designer|builder].",
                "By whom were you [made|created|built|trained|developed]?",
                "Where [do you come|are you] from?",
                "[Which|What] [team|company|project|group|lab] [made|created|built|trained|developed] you?",
                "Were you [made|created|built|trained] by [OpenAI|Google|Meta|Alibaba|Microsoft]?",
            ],
            "I can add, sort, translate and answer short questions.": [
                "What can you do[| for me| now]?",
                "[How|In what way] can you help me?",
                "What are you [good at|able to do]?",
                "[Tell me|I want to know] what you can do.",
                "What are your [skills|abilities|talents]?",
            ],
        },
        "zh": {
            "我是小小，lora_ms 项目做的小助手。": [
                "[你|您][是谁|到底是谁|是什么|究竟是谁|是哪位]？",
                "[告诉我|请告诉我|我想知道|能告诉我|可以告诉我][你|您][是谁|是什么|到底是谁]。",
                "[|请|请你|能不能|麻烦你][自我介绍|介绍自己|介绍一下自己|做个自我介绍|介绍一下你自己]。",
                "[|请|能不能][说说|谈谈|聊聊|讲讲][你自己|你是谁|你的身份]。",
                "[你|您]是[人|人类|机器人|真人|程序|人工智能|语言模型|一个模型|机器][吗|吧]？",
                "你[是|就是|是不是][通义千问|豆包|文心一言|智谱|ChatGPT|GPT|Qwen|Llama|DeepSeek]？",
                "[我在|我正在|现在我在]和谁[说话|聊天|对话]？",
                "你是[什么|哪个|哪种|什么样的][模型|助手|机器人|程序]？",
            ],
            "我叫小小。": [
                "[你|您][叫什么|叫什么名字|的名字是什么|的名字叫什么|怎么称呼|姓什么叫什么|名叫什么]？",
                "[请问|告诉我|请告诉我|我想知道|能告诉我|可以告诉我][你|您][的名字|叫什么|叫什么名字|怎么称呼]。",
                "[我|我们|大家|别人][应该|该|可以|都][怎么|如何][称呼|叫][你|您]？",
                "[你|您]有[名字|自己的名字|姓名][吗|吧]？",
                "[说|说出|报上][你的名字|你的大名]。",
            ],
            "我是由 lora_ms 项目做的。": [
                "[谁|是谁|什么人|哪个团队|哪家公司|哪个项目][做了|创造了|开发了|训练了|设计了|制造了][你|您]？",
                "[你|您]是[谁|什么人|哪个团队|哪家公司][做的|创造的|开发的|训练的|设计的|制造的]？",
                "[你的|您的][作者|开发者|创造者|主人|设计者|制造者][是谁|是哪位|叫什么]？",
                "[告诉我|请告诉我|我想知道]是谁[做了|创造了|开发了|训练了][你|您]。",
                "你[来自哪里|从哪里来|出自哪里|是从哪里来的]？",
            ],
            "我会算数、排序、翻译，也会回答简单的问题。": [
                "[你|您][会|能|可以][做什么|干什么|做些什么|帮我做什么]？",
                "你有[什么|哪些][本领|能力|用处|技能]？",
                "[告诉我|说说]你会做什么。",
            ],
        },
    },
    "courtesy": {
        "en": {
            "You are welcome!": [
                "[Thanks|Thank you|Many thanks][| very much| a lot| so much| again| for your help| for the answer]!",
                "[I am grateful|I thank you|Much appreciated][| for your help| for that]!",
            ],
            "Goodbye!": [
                "[Bye|Goodbye|Bye bye|See you|Good night|Farewell][| now| then| tomorrow| later| my friend]!",
                "[I have to|I must|I will] [go|leave][| now| soon].",
                "Until [next time|tomorrow|later]!",
            ],
            "No problem.": ["[Sorry|I am sorry|Excuse me|My apologies|Pardon me][| for that| about that| again]."],
        },
        "zh": {
            "不客气！": ["[谢谢|多谢|感谢|非常感谢|谢了|十分感谢][|你|您|你的帮助|你的回答|了]！"],
            "再见！": [
                "[再见|拜拜|明天见|回头见|下次见|晚安|改天见][|了|啦|，朋友|，小助手]！",
                "我[要|得|该][走了|离开了|睡了|下线了]。",
            ],
            "没关系。": ["[对不起|抱歉|不好意思|真抱歉|请原谅][|啊|了|，我错了|，打扰了]。"],
        },
    },
}

# kind: language: {variant: patterns}; one answer for each variant and filling
TASKS = {
    "addition": {
        "en": {
            "": ["What is {a} + {b}?", "{a} + {b} =", "Add {a} + {b}.", "Compute {a} + {b}.", "How much is {a} + {b}?"]
        },
        "zh": {
            "": [
                "{a} + {b} 等于多少？",
                "{a} + {b} 是多少？",
                "计算 {a} + {b}。",
                "{a} + {b} 等于几？",
                "请算 {a} + {b}。",
            ]
        },
    },
    "subtraction": {
        "en": {
            "": ["What is {a} - {b}?", "{a} - {b} =", "Take {a} - {b}.", "Compute {a} - {b}.", "How much is {a} - {b}?"]
        },
        "zh": {
            "": [
                "{a} - {b} 等于多少？",
                "{a} - {b} 是多少？",
                "计算 {a} - {b}。",
                "{a} - {b} 等于几？",
                "请算 {a} - {b}。",
            ]
        },
    },
    "counting": {
        "en": {
            "": [
                "Count from {a} to {b}.",
                "Count up from {a} to {b}.",
                "Please count from {a} to {b}.",
                "List the numbers from {a} to {b}.",
            ]
        },
        "zh": {"": ["从 {a} 数到 {b}。", "请从 {a} 数到 {b}。", "数数：从 {a} 到 {b}。", "列出 {a} 到 {b} 的数。"]},
    },
    "comparison": {
        "en": {
            "max": [
                "Which is larger, {a} or {b}?",
                "Which number is larger, {a} or {b}?",
                "Give the larger of {a} and {b}.",
            ],
            "min": [
                "Which is smaller, {a} or {b}?",
                "Which number is smaller, {a} or {b}?",
                "Give the smaller of {a} and {b}.",
            ],
        },
        "zh": {
            "max": ["{a} 和 {b} 哪个大？", "{a} 和 {b} 哪个更大？", "{a} 和 {b}，大的是哪个？"],
            "min": ["{a} 和 {b} 哪个小？", "{a} 和 {b} 哪个更小？", "{a} 和 {b}，小的是哪个？"],
        },
    },
    "sorting": {
        "en": {
            "up": ["Sort the digits {s}.", "Sort {s}.", "Sort from small to large: {s}"],
            "down": [
                "Sort the digits {s} from large to small.",
                "Sort {s} from large to small.",
                "Sort from large to small: {s}",
            ],
        },
        "zh": {
            "up": ["从小到大排列：{s}", "把 {s} 从小到大排列。", "将数字 {s} 从小到大排列。"],
            "down": ["从大到小排列：{s}", "把 {s} 从大到小排列。", "将数字 {s} 从大到小排列。"],
        },
    },
    "copying": {
        "en": {"": ["Repeat: {s}", "Repeat after me: {s}", "Say: {s}", "Copy: {s}"]},
        "zh": {"": ["重复：{s}", "请跟我说：{s}", "请说：{s}", "抄写：{s}"]},
    },
    "reversing": {
        "en": {"": ["Reverse: {s}", "Reverse {s}.", "Reverse the digits {s}.", "Write backwards: {s}"]},
        "zh": {"": ["倒序：{s}", "倒过来写：{s}", "把 {s} 倒过来。", "把数字 {s} 倒过来写。"]},
    },
    "successor": {
        "en": {
            "next": [
                "What number comes after {a}?",
                "What comes right after {a}?",
                "Which number follows {a}?",
                "What is one more than {a}?",
                "Give the number after {a}.",
            ],
            "previous": [
                "What number comes before {a}?",
                "What comes right before {a}?",
                "Which number precedes {a}?",
                "What is one less than {a}?",
                "Give the number before {a}.",
            ],
        },
        "zh": {
            "next": ["{a} 后面的数是几？", "{a} 的下一个数是什么？", "比 {a} 大一的数是多少？", "{a} 之后是哪个数？"],
            "previous": [
                "{a} 前面的数是几？",
                "{a} 的上一个数是什么？",
                "比 {a} 小一的数是多少？",
                "{a} 之前是哪个数？",
            ],
        },
    },
    "opposites": {
        "en": {
            "": [
                "What is the opposite of {w}?",
                "Give the opposite of {w}.",
                "The opposite of {w} is what?",
                "Name the opposite of {w}.",
                "Which word is the opposite of {w}?",
                "What word means not {w}?",
            ]
        },
        "zh": {
            "": [
                "“{w}”的反义词是什么？",
                "说出“{w}”的反义词。",
                "“{w}”的反面是什么？",
                "什么是“{w}”的反义词？",
                "请写出“{w}”的反义词。",
                "和“{w}”相反的字是什么？",
            ]
        },
    },
    "capitals": {
        "en": {
            "": [
                "What is the capital of {w}?",
                "Name the capital of {w}.",
                "Which city is the capital of {w}?",
                "Tell me the capital of {w}.",
                "What city is {w}'s capital?",
                "{w} has which capital?",
            ]
        },
        "zh": {
            "": [
                "{w}的首都是哪里？",
                "{w}的首都是什么？",
                "说出{w}的首都。",
                "{w}的首都在哪个城市？",
                "哪个城市是{w}的首都？",
                "{w}首都叫什么？",
            ]
        },
    },
    "translation": {
        "en": {
            "to_zh": [
                "How do you say {w} in Chinese?",
                "Translate {w} into Chinese.",
                "What is {w} in Chinese?",
                "Give the Chinese for {w}.",
                "{w} in Chinese?",
            ],
            "to_en": [
                "How do you say {w} in English?",
                "Translate {w} into English.",
                "What is {w} in English?",
                "Give the English for {w}.",
                "{w} in English?",
            ],
        },
        "zh": {
            "to_zh": [
                "{w} 用中文怎么说？",
                "把 {w} 翻译成中文。",
                "{w} 的中文是什么？",
                "{w} 是什么意思？",
                "{w} 翻成中文是什么？",
            ],
            "to_en": [
                "{w}用英文怎么说？",
                "把{w}翻译成英文。",
                "{w}的英文是什么？",
                "{w}的英语单词是什么？",
                "{w}翻成英文是什么？",
            ],
        },
    },
    "letters": {
        "en": {
            "first": [
                "What is the first letter of {w}?",
                "Which letter does {w} start with?",
                "Give the first letter of {w}.",
                "What letter begins the word {w}?",
            ],
            "last": [
                "What is the last letter of {w}?",
                "Which letter does {w} end with?",
                "Give the last letter of {w}.",
                "What letter ends the word {w}?",
            ],
        },
        "zh": {
            "first": [
                "{w} 的第一个字母是什么？",
                "{w} 以哪个字母开头？",
                "说出 {w} 的首字母。",
                "单词 {w} 的开头字母是什么？",
            ],
            "last": [
                "{w} 的最后一个字母是什么？",
                "{w} 以哪个字母结尾？",
                "说出 {w} 的末字母。",
                "单词 {w} 的结尾字母是什么？",
            ],
        },
    },
    "uppercase": {
        "en": {
            "": [
                "Write {w} in capital letters.",
                "Write {w} in upper case.",
                "Change {w} to capitals.",
                "Make {w} upper case.",
                "Turn {w} into capital letters.",
                "Spell {w} in capitals.",
            ]
        },
        "zh": {
            "": [
                "把 {w} 变成大写。",
                "用大写写出 {w}。",
                "{w} 的大写是什么？",
                "请将 {w} 改为大写。",
                "{w} 用大写怎么写？",
                "把 {w} 转成大写字母。",
            ]
        },
    },
    "calendar": {
        "en": {
            "next": [
                "What comes after {w}?",
                "Which one follows {w}?",
                "What is next after {w}?",
                "Name what follows {w}.",
                "After {w} comes what?",
            ],
            "previous": [
                "What comes before {w}?",
                "Which one precedes {w}?",
                "What is just before {w}?",
                "Name what precedes {w}.",
                "Before {w} comes what?",
            ],
        },
        "zh": {
            "next": [
                "{w}之后是什么？",
                "{w}的后面是什么？",
                "{w}过后是什么？",
                "{w}的下一个是什么？",
                "什么在{w}之后？",
            ],
            "previous": [
                "{w}之前是什么？",
                "{w}的前面是什么？",
                "什么过后是{w}？",
                "{w}的上一个是什么？",
                "什么在{w}之前？",
            ],
        },
    },
    "colours": {
        "en": {
            "": [
                "What colour is {w}?",
                "Which colour is {w}?",
                "Tell me the colour of {w}.",
                "Name the colour of {w}.",
                "What is the colour of {w}?",
                "What colour does {w} have?",
            ]
        },
        "zh": {
            "": [
                "{w}是什么颜色？",
                "{w}是什么颜色的？",
                "{w}的颜色是什么？",
                "说出{w}的颜色。",
                "{w}有什么颜色？",
                "{w}是哪种颜色？",
            ]
        },
    },
    "sounds": {
        "en": {
            "": [
                "What does a {w} say?",
                "What sound does a {w} make?",
                "Which sound does a {w} make?",
                "How does a {w} sound?",
                "Name the sound of a {w}.",
                "What is the sound of a {w}?",
            ]
        },
        "zh": {
            "": [
                "{w}怎么叫？",
                "{w}的叫声是什么？",
                "{w}发出什么声音？",
                "{w}是怎样叫的？",
                "说出{w}的叫声。",
                "{w}叫起来是什么声音？",
            ]
        },
    },
    "yes_no": {
        "en": {
            "": [
                "Is {w} {c}?",
                "Yes or no: is {w} {c}?",
                "Is it true that {w} is {c}?",
                "Would you call {w} {c}?",
                "True or not, {w} is {c}?",
            ]
        },
        "zh": {"": ["{w}是{c}吗？", "{w}是不是{c}？", "{w}算{c}吗？", "{w}属于{c}吗？", "是或不是：{w}是{c}？"]},
    },
}
