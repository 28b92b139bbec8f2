"""Chat formats beside the five in templates.py: a table with one row for each.

    python -m text.template_check             lists them
    python -m text.template_check llama3      shows one

To add a format, add a row to TEMPLATES:

    "mychat": Template(
        prefix=(BOS,),                                # once, before everything
        system=("<sys>{{content}}</sys>",),
        user=("<user>{{content}}</user><bot>",),      # up to where the answer begins
        assistant=("{{content}}", EOS),               # the answer; all of it carries loss
    ),

docs/templates.md explains it, and shows the same format in a yaml file.

Requires: templates.py, text/tool_formats.py.
Next: text/written_formats.py (formats in a config file), text/template_check.py, which chooses the
format of a checkpoint.
Sources: the vendors' chat templates, as published in their tokenizer_config.json. The names of the
formats and the borders of the slots are those of LLaMA-Factory 0.9.5 (0.9.4: baichuan, baichuan2,
belle, codegeex4, intern, orion, xverse).
"""
from dataclasses import replace

from templates import (BOS, CHATML, EOS, GEMMA, LLAMA3, MISTRAL, QWEN, Template, Token,
                       ToolFormat)
from text.tool_formats import with_tool_functions


# ---- formats that several rows have in common ---------------------------------------------------


PLAIN_CHATML = replace(CHATML, observation=None, stop=("<|im_end|>",), stop_is_eos=False,
                       own_jinja=False)

QWEN3 = replace(QWEN, default_system="", families=("qwen3", "qwen3_moe", "qwen3_next"))

QWEN3_5 = replace(
    QWEN3, tool_format=ToolFormat("qwen3_5"), says=("<|im_start|>", "<function="),
    families=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"))

MINISTRAL = replace(
    MISTRAL,
    user=("[INST]{{content}}[/INST]",),
    assistant=("{{content}}", EOS),
    function=("[TOOL_CALLS]{{content}}", EOS),
    observation=('[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',),
    says=("[INST]",),
)

# from version 7 of the tokenizer on, a text may stand before the calls
MISTRAL_V7 = replace(MINISTRAL, function=("{{content}}", EOS),
                     tool_format=ToolFormat("mistral_small"),
                     families=(*MISTRAL.families, "mistral3", "ministral3"))

LLAMA2 = Template(
    user=(BOS, "[INST] {{content}} [/INST]"),
    system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",),
    system_in_user=True,
    families=("llama",),
    needs=("<s>", "</s>"),
    says=("[INST]", "<<SYS>>"),
)

GLM4 = Template(
    user=("<|user|>\n{{content}}<|assistant|>",),
    assistant=("\n{{content}}",), function=("{{content}}",), efficient_eos=True,
    system=("<|system|>\n{{content}}",),
    observation=("<|observation|>\n{{content}}<|assistant|>",),
    prefix=("[gMASK]<sop>",), tool_format=ToolFormat("glm4"), stop=("<|user|>", "<|observation|>"),
    families=("glm", "glm4", "chatglm"),
    needs=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), says=("[gMASK]", "<sop>"))

GLM4_MOE = replace(         # GLM-4.5, GLM-4.6
    GLM4, tool_format=ToolFormat("glm4_moe"), reasoning=True,
    families=("glm4_moe", "glm4_moe_lite"), says=("[gMASK]", "<sop>", "<arg_key>", "/nothink"))

GLM4_7 = replace(
    GLM4_MOE, thought=("<think>", "</think>"), empty_thought="</think>",
    says=("[gMASK]", "<sop>", "<arg_key>"))

DEEPSEEK3 = Template(
    user=("<｜User｜>{{content}}<｜Assistant｜>",),
    prefix=(BOS,),
    families=("deepseek_v3", "qwen2", "qwen3", "llama"),
    needs=("<｜User｜>", "<｜Assistant｜>"), says=("<｜User｜>",))

PHI = Template(
    user=("<|user|>\n{{content}}<|end|>\n<|assistant|>\n",),
    assistant=("{{content}}<|end|>\n",),
    system=("<|system|>\n{{content}}<|end|>\n",),
    stop=("<|end|>",), stop_is_eos=True,
    families=("phi3",), needs=("<|user|>", "<|assistant|>", "<|end|>"), says=("<|end|>",))

GEMMA3 = replace(GEMMA, families=("gemma3", "gemma3_text"))

GEMMA4 = Template(
    user=("<|turn>user\n{{content}}<turn|>\n<|turn>model\n",),
    assistant=("{{content}}<turn|>\n",), function=("<|tool>{{content}}<tool|>",),
    system=("<|turn>system\n<|think|>{{content}}<turn|>\n",),
    observation=("<|turn>tool\n{{content}}<turn|>\n<|turn>model\n",),
    prefix=(BOS,), default_system="You are a helpful assistant.",
    tool_format=ToolFormat("gemma4"), stop=("<turn|>",), stop_is_eos=True,
    thought=("<|channel>thought\n", "<channel|>"), reasoning=True,
    families=("gemma4", "gemma4_text"), needs=("<|turn>", "<turn|>"), says=("<|turn>",))

MIMO = replace(
    QWEN, reasoning=True, default_system="You are a helpful assistant.", families=("mimo",),
    says=("<|im_start|>", "MiMo"))

INTERNLM_SELF = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by "
    "Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language "
    "chosen by the user such as English and 中文.")


# ---- the table ----------------------------------------------------------------------------------


# Where neither the config nor the checkpoint decides, the first row that fits is chosen.
TEMPLATES = {
    "deepseekr1": replace(DEEPSEEK3, reasoning=True, says=("<｜User｜>", "</think>")),
    "deepseek3": DEEPSEEK3,
    "llama3": LLAMA3,
    "llama4": Template(
        user=("<|header_start|>user<|header_end|>\n\n{{content}}<|eot|>"
              "<|header_start|>assistant<|header_end|>\n\n",),
        assistant=("{{content}}<|eot|>",),
        system=("<|header_start|>system<|header_end|>\n\n{{content}}<|eot|>",),
        observation=("<|header_start|>ipython<|header_end|>\n\n{{content}}<|eot|>"
                     "<|header_start|>assistant<|header_end|>\n\n",),
        prefix=(BOS,), tool_format=ToolFormat("llama3"),
        stop=("<|eot|>", "<|eom|>"), stop_is_eos=True,
        families=("llama4", "llama4_text"),
        needs=("<|header_start|>", "<|header_end|>", "<|eot|>"), says=("<|header_start|>",)),
    "qwen3": replace(QWEN3, reasoning=True, says=("<|im_start|>", "</think>")),
    "qwen3_nothink": QWEN3,
    "qwen": QWEN,
    "qwen3_5": replace(QWEN3_5, reasoning=True, says=("<|im_start|>", "</think>", "<function=")),
    "qwen3_6": replace(QWEN3_5, reasoning=True, says=("<|im_start|>", "</think>", "<function=")),
    "qwen3_5_nothink": QWEN3_5,
    "mimo": MIMO,
    "mimo_v2": replace(
        MIMO, thought=("<think>", "</think>"),
        default_system="You are MiMo, a helpful AI assistant engineered by Xiaomi.",
        families=("mimo_v2", "mimo_v2_flash")),
    "sailor": replace(  # a Qwen 1.5 body
        PLAIN_CHATML,
        user=("<|im_start|>question\n{{content}}<|im_end|>\n<|im_start|>answer\n",),
        default_system="You are an AI assistant named Sailor created by Sea AI Lab. "
                       "Your answer should be friendly, unbiased, faithful, informative and "
                       "detailed.",
        families=("qwen2",), says=("<|im_start|>", "Sailor")),
    "mistral": MISTRAL,
    "mistral_small": replace(
        MISTRAL_V7,
        system=("[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]",), system_in_user=False,
        says=("[SYSTEM_PROMPT]",)),
    "ministral": MINISTRAL,  # Ministral 8B, Nemo
    "ministral3": MISTRAL_V7,
    "llama2": LLAMA2,
    "llama2_zh": replace(
        LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    "phi4": Template(
        user=("<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{{content}}<|im_end|>",),
        stop=("<|im_end|>",), stop_is_eos=True,
        families=("phi3",), needs=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        says=("<|im_sep|>",)),
    "phi4_mini": replace(
        PHI,
        user=("<|user|>{{content}}<|end|><|assistant|>",),
        assistant=("{{content}}<|end|>",),
        system=("<|system|>{{content}}<|end|>",),
        tool_format=ToolFormat("phi4_mini"), needs=(*PHI.needs, "<|tool|>")),
    "phi": PHI,  # Phi-3, Phi-3.5
    "phi_small": replace(PHI, families=("phi3small",)),
    "gemma2": replace(GEMMA, stop=("<eos>", "<end_of_turn>"), stop_is_eos=False, efficient_eos=True,
                      families=("gemma2",)),
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "gemma3n": replace(GEMMA3, families=("gemma3n", "gemma3n_text")),
    "gemma4": GEMMA4,
    "gemma4n": GEMMA4,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "glm4_7": GLM4_7,
    "aeva": replace(
        GLM4_7, default_system="You are an AI assistant named Aeva created by Zongzhi Lou. "
                               "Your answer should be friendly, unbiased, faithful, informative "
                               "and detailed.",
        families=(), says=("[gMASK]", "<sop>", "Aeva")),
    "glmz1": replace(
        GLM4, reasoning=True, says=("[gMASK]", "<sop>", "</think>"), families=("glm4",)),
    "codegeex4": replace(
        GLM4,
        user=("<|user|>\n{{content}}<|assistant|>\n",),
        assistant=("{{content}}",),
        observation=("<|observation|>\n{{content}}<|assistant|>\n",),
        default_system="你是一位智能编程助手，你叫CodeGeeX。"
                       "你会为用户回答关于编程、代码、计算机方面的任何问题，"
                       "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。",
        families=("chatglm",)),
    "chatglm3": Template(
        user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
        assistant=("\n", "{{content}}"), function=("{{content}}",), efficient_eos=True,
        system=(Token("<|system|>"), "\n", "{{content}}"),
        observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
        prefix=(Token("[gMASK]"), Token("sop")), tool_format=ToolFormat("glm4"),
        stop=("<|user|>", "<|observation|>"),
        families=("chatglm",), needs=("[gMASK]", "sop", "<|user|>", "<|assistant|>"),
        says=("[gMASK]", "sop")),
    "baichuan2": Template(
        user=("<reserved_106>{{content}}<reserved_107>",),
        assistant=("{{content}}",), efficient_eos=True,
        families=("baichuan",), needs=("<reserved_106>", "<reserved_107>"),
        says=("<reserved_106>",)),
    "baichuan": Template(
        user=(Token("<reserved_102>"), "{{content}}", Token("<reserved_103>")),
        assistant=("{{content}}",), efficient_eos=True,
        families=("baichuan",), needs=("<reserved_102>", "<reserved_103>"),
        says=("<reserved_102>",)),
    "xverse": Template(
        user=("Human: {{content}}\n\nAssistant: ",),
        families=("xverse",), says=("Human: ", "Assistant: ")),
    "intern2": replace(
        PLAIN_CHATML, prefix=(BOS,), default_system=INTERNLM_SELF,
        families=("internlm2", "internlm3")),
    "olmo": Template(
        user=("<|user|>\n{{content}}<|assistant|>\n",),
        prefix=(EOS,),
        families=("olmo", "olmo2"), says=("<|user|>", "<|assistant|>")),
    # OLMo 2 Instruct and other Tülu models; LLaMA-Factory trains them with `olmo`
    "olmo2": Template(
        user=("<|user|>\n{{content}}\n<|assistant|>\n",),
        assistant=("{{content}}", EOS, "\n"),
        system=("<|system|>\n{{content}}\n",),
        prefix=(BOS,),
        families=("olmo2", "llama"), says=("<|user|>", "<|system|>", "bos_token")),
    "deepseekcoder": Template(
        user=("### Instruction:\n{{content}}\n### Response:",),
        assistant=("\n{{content}}\n<|EOT|>\n",),
        prefix=(BOS,),
        default_system="You are an AI programming assistant, utilizing the DeepSeek Coder model, "
                       "developed by DeepSeek Company, and you only answer questions related to "
                       "computer science. "
                       "For politically sensitive questions, security and privacy issues, "
                       "and other non-computer science questions, you will refuse to answer.\n",
        families=("llama",), needs=("<|EOT|>", "<｜begin▁of▁sentence｜>"),
        says=("### Instruction:", "<|EOT|>")),
    "deepseek": Template(
        user=("User: {{content}}\n\nAssistant:",),
        system=("{{content}}\n\n",),
        prefix=(BOS,),
        families=("llama", "deepseek_v2"), needs=("<｜begin▁of▁sentence｜>",),
        says=("User: ", "Assistant:")),
    "yi": replace(
        PLAIN_CHATML,
        families=("llama",), needs=("<|startoftext|>", "<|im_start|>", "<|im_end|>")),
    "smollm2": replace(
        PLAIN_CHATML,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        families=("llama", "smollm3"), says=("<|im_start|>", "SmolLM")),
    "opencoder": replace(
        PLAIN_CHATML, observation=CHATML.observation,
        default_system="You are OpenCoder, created by OpenCoder Team.",
        families=("llama",), says=("<|im_start|>", "OpenCoder")),
    "smollm": replace(PLAIN_CHATML, families=("llama", "smollm3")),
    "openchat-3.6": Template(  # a Llama 3 body
        user=("<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{{content}}<|eot_id|>"
              "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",),
        prefix=(BOS,), stop=("<|eot_id|>",),
        families=("llama",), needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        says=("<|start_header_id|>", "GPT4 Correct")),
    "openchat": Template(
        user=("GPT4 Correct User: {{content}}", EOS, "GPT4 Correct Assistant:"),
        prefix=(BOS,),
        families=("mistral",), says=("GPT4 Correct",)),
    "zephyr": Template(
        user=("<|user|>\n{{content}}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{{content}}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
        families=("mistral", "llama"), says=("<|user|>", "<|assistant|>")),  # TinyLlama too
    "breeze": Template(
        user=("[INST] {{content}} [/INST] ",),
        assistant=("{{content}}",), efficient_eos=True,
        prefix=(BOS,),
        families=("mistral",), says=("[INST] ", " [/INST] ")),
    "solar": Template(
        user=("### User:\n{{content}}\n\n### Assistant:\n",),
        assistant=("{{content}}",), efficient_eos=True,
        system=("### System:\n{{content}}\n\n",),
        families=("llama",), says=("### User:", "### Assistant:")),
    "seed_coder": Template(
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        system=(BOS, "system\n{{content}}", EOS),
        default_system="You are an AI programming assistant, utilizing the Seed-Coder model, "
                       "developed by ByteDance Seed, and you only answer questions related to "
                       "computer science. For politically sensitive questions, security and "
                       "privacy issues, and other non-computer science questions, you will "
                       "refuse to answer.\n\n",
        families=("llama",), says=("Seed-Coder",)),
    "seed_oss": Template(
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        function=(BOS, "\n{{content}}", EOS),
        system=(BOS, "system\n{{content}}", EOS),
        tool_format=ToolFormat("seed_oss"), thought=("<seed:think>", "</seed:think>"),
        reasoning=True,
        families=("seed_oss",), needs=("<seed:think>", "</seed:think>"), says=("seed:think",)),
    "gpt_oss": Template(
        user=("<|start|>user<|message|>{{content}}<|end|><|start|>assistant",),
        assistant=("{{content}}",), efficient_eos=True,
        system=("<|start|>system<|message|>{{content}}<|end|>",),
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        thought=("<|channel|>analysis<|message|>",
                 "<|end|><|start|>assistant<|channel|>final<|message|>"),
        reasoning=True,
        families=("gpt_oss",), needs=("<|start|>", "<|message|>", "<|channel|>"),
        says=("<|start|>", "<|channel|>")),
    "lfm2": Template(
        user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
        assistant=("{{content}}<|im_end|>\n",),
        system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
        observation=("<|im_start|>tool\n<|tool_response_start|>{{content}}<|tool_response_end|>"
                     "<|im_end|>\n<|im_start|>assistant\n",),
        default_system="You are a helpful AI assistant.", tool_format=ToolFormat("lfm2"),
        stop=("<|im_end|>",), stop_is_eos=True,
        families=("lfm2", "lfm2_moe"), needs=("<|im_start|>", "<|im_end|>"),
        says=("<|im_start|>",)),
    "ernie": Template(      # ERNIE 4.5 Thinking
        user=("<|im_start|>user\n{{content}}<|im_end|>\n\n<|im_start|>assistant\n",),
        assistant=("{{content}}<|im_end|>\n\n",),
        system=("<|im_start|>system\n{{content}}<|im_end|>\n\n",),
        observation=("<|im_start|>tool\n{{content}}<|im_end|>\n\n<|im_start|>assistant\n",),
        default_system="<global_setting>\nthink_mode=True\n</global_setting>",
        stop=("<|im_end|>",), families=("ernie4_5", "ernie4_5_moe"),
        needs=("<|im_start|>", "<|im_end|>"), says=("<|im_start|>", "think_mode")),
    "ernie_nothink": Template(
        user=("User: {{content}}\nAssistant: ",),
        assistant=("{{content}}<|end_of_sentence|>",),
        system=("{{content}}\n",), prefix=("<|begin_of_sentence|>",),
        stop=("<|end_of_sentence|>",), families=("ernie4_5", "ernie4_5_moe"),
        needs=("<|begin_of_sentence|>", "<|end_of_sentence|>"),
        says=("<|begin_of_sentence|>", "User: ", "Assistant: ")),
    "hunyuan": Template(
        user=("{{content}}<|extra_0|>",),
        assistant=("{{content}}<|eos|>",),
        system=("{{content}}<|extra_4|>",), prefix=("<|startoftext|>",),
        stop=("<|eos|>",), families=("hunyuan_v1_dense", "hunyuan_v1_moe"),
        needs=("<|startoftext|>", "<|extra_0|>", "<|eos|>"), says=("<|extra_0|>",)),
    "hunyuan_small": Template(
        user=("<｜hy_User｜>{{content}}<｜hy_place▁holder▁no▁8｜>",),
        assistant=("{{content}}<｜hy_place▁holder▁no▁2｜>",),
        system=("{{content}}<｜hy_place▁holder▁no▁3｜>",), prefix=("<｜hy_begin▁of▁sentence｜>",),
        stop=("<｜hy_place▁holder▁no▁2｜>",), families=("hunyuan_v1_dense",),
        needs=("<｜hy_User｜>", "<｜hy_place▁holder▁no▁2｜>"),
        says=("<｜hy_User｜>", "<｜hy_place▁holder▁no▁2｜>")),
    "minimax2": Template(
        user=("]~b]user\n{{content}}[e~[\n]~b]ai\n",),
        assistant=("{{content}}[e~[\n",),
        system=("]~!b[]~b]system\n{{content}}[e~[\n",),
        observation=("]~b]tool\n<response>{{content}}</response>[e~[\n]~b]ai\n",),
        default_system="You are a helpful assistant. Your name is MiniMax-M2.1 and is built by "
                       "MiniMax.",
        tool_format=ToolFormat("minimax2"), stop=("[e~[",), reasoning=True,
        families=("minimax_m2",), needs=("]~b]", "[e~["), says=("]~b]", "[e~[")),
    "xuanyuan": Template(
        user=("Human: {{content}} Assistant:",),
        default_system="以下是用户和人工智能助手之间的对话。"
                       "用户以Human开头，人工智能助手以Assistant开头，"
                       "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，"
                       "并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。\n",
        families=("llama",), says=("Human:", " Assistant:")),
    "orion": Template(
        user=("Human: {{content}}\n\nAssistant: ", EOS),
        prefix=(BOS,), families=("orion",), says=("Human: ", "Assistant: ")),
    "belle": Template(
        user=("Human: {{content}}\n\nBelle: ",),
        assistant=("{{content}}", EOS, "\n\n"),
        prefix=(BOS,), families=("llama",), says=("Belle",)),
    # Formats of networks that are not in families.py; any model can be taught them:
    "starchat": replace(
        PHI,
        user=("<|user|>\n{{content}}<|end|>\n<|assistant|>",),
        stop_is_eos=False, families=()),
    "granite3": Template(
        user=("<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n"
              "<|start_of_role|>assistant<|end_of_role|>",),
        assistant=("{{content}}<|end_of_text|>\n",),
        system=("<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",),
        needs=("<|start_of_role|>", "<|end_of_role|>"), says=("<|start_of_role|>",)),
    "granite4": Template(
        # LLaMA-Factory's: after the result of a tool, a line break instead of <|end_of_role|>
        user=("<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n"
              "<|start_of_role|>assistant<|end_of_role|>",),
        assistant=("{{content}}<|end_of_text|>\n",),
        system=("<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",),
        observation=("<|start_of_role|>tool<|end_of_role|>{{content}}<|end_of_text|>\n"
                     "<|start_of_role|>assistant\n",),
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
        stop=("<|end_of_text|>",),
        needs=("<|start_of_role|>", "<|end_of_role|>"), says=("<|start_of_role|>", "g4_")),
    "cohere": Template(
        user=("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>"
              "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",),
        system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>",),
        prefix=(BOS,),
        needs=("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"), says=("<|START_OF_TURN_TOKEN|>",)),
    "falcon": Template(
        user=("User: {{content}}\nFalcon:",),
        assistant=("{{content}}\n",), efficient_eos=True,
        says=("Falcon:",)),
    "exaone": Template(
        user=("[|user|]{{content}}\n[|assistant|]",),
        assistant=("{{content}}", EOS, "\n"),
        system=("[|system|]{{content}}[|endofturn|]\n",),
        needs=("[|user|]", "[|assistant|]"), says=("[|user|]",)),
    "moonlight": Template(
        user=("<|im_user|>user<|im_middle|>{{content}}<|im_end|>"
              "<|im_assistant|>assistant<|im_middle|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_system|>system<|im_middle|>{{content}}<|im_end|>",),
        default_system="You are a helpful assistant provided by Moonshot-AI.",
        stop=("<|im_end|>",), stop_is_eos=True,
        needs=("<|im_user|>", "<|im_middle|>", "<|im_end|>"), says=("<|im_middle|>",)),
    "intern": Template(  # InternLM 1
        user=("<|User|>:{{content}}\n<|Bot|>:",),
        assistant=("{{content}}<eoa>\n",),
        system=("<|System|>:{{content}}\n",),
        prefix=(BOS,), default_system=INTERNLM_SELF, stop=("<eoa>",),
        needs=("<eoa>",), says=("<|User|>", "<|Bot|>")),
    "telechat2": Template(
        user=("<_user>{{content}}<_bot>",),
        system=("<_system>{{content}}",),
        default_system="你是中国电信星辰语义大模型，英文名是TeleChat，"
                       "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）"
                       "研发的人工智能助手。",
        needs=("<_user>", "<_bot>"), says=("<_user>",)),
    "yuan": Template(
        user=("{{content}}", Token("<sep>")),
        assistant=("{{content}}<eod>\n",), stop=("<eod>",),
        needs=("<sep>", "<eod>"), says=("<sep>",)),
    "bailing": Template(
        user=("<role>HUMAN</role>{{content}}<role>ASSISTANT</role>",),
        assistant=("{{content}}",), efficient_eos=True,
        system=("<role>SYSTEM</role>{{content}}",),
        observation=("<role>OBSERVATION</role>{{content}}<role>ASSISTANT</role>",),
        stop=("<|endoftext|>",), needs=("<role>", "</role>"), says=("<role>",)),
    "bailing_v2": Template(     # Ling 2.0
        user=("<role>HUMAN</role>{{content}}<|role_end|><role>ASSISTANT</role>",),
        assistant=("{{content}}<|role_end|>",), efficient_eos=True,
        system=("<role>SYSTEM</role>{{content}}<|role_end|>",),
        observation=("<role>OBSERVATION</role>\n<tool_response>\n{{content}}\n</tool_response>"
                     "<|role_end|><role>ASSISTANT</role>",),
        tool_format=ToolFormat("ling"), stop=("<|endoftext|>",),
        needs=("<role>", "</role>", "<|role_end|>"), says=("<role>", "<|role_end|>")),
    "youtu": Template(
        user=("<|User|>{{content}}<|Assistant|>",),
        assistant=("{{content}}<|end_of_text|>",), function=("{{content}}",),
        observation=("<tool_response>\n{{content}}\n</tool_response><|Assistant|>",),
        prefix=(BOS,), stop=("<|end_of_text|>",), stop_is_eos=True, reasoning=True,
        needs=("<|User|>", "<|Assistant|>", "<|end_of_text|>"), says=("<|User|>", "</think>")),
    "hy3": Template(
        user=("<｜hy_User｜>{{content}}<｜hy_Assistant｜>",),
        assistant=("{{content}}<｜hy_eos｜>",),
        prefix=(BOS,), stop=("<｜hy_eos｜>",), stop_is_eos=True,
        thought=("<think>", "</think>"), reasoning=True,
        needs=("<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_eos｜>"),
        says=("<｜hy_User｜>", "<｜hy_eos｜>")),
    "minimax1": Template(
        user=("<beginning_of_sentence>user name=user\n{{content}}<end_of_sentence>\n"
              "<beginning_of_sentence>ai name=assistant\n",),
        assistant=("{{content}}<end_of_sentence>\n",),
        system=("<beginning_of_sentence>system ai_setting=assistant\n{{content}}"
                "<end_of_sentence>\n",),
        observation=("<beginning_of_sentence>tool name=tools\n{{content}}<end_of_sentence>\n"
                     "<beginning_of_sentence>ai name=assistant\n",),
        default_system="You are a helpful assistant.", tool_format=ToolFormat("minimax1"),
        stop=("<end_of_sentence>",),
        needs=("<beginning_of_sentence>", "<end_of_sentence>"),
        says=("<beginning_of_sentence>",)),
    "index": Template(
        user=("reserved_0{{content}}reserved_1",),
        assistant=("{{content}}",), efficient_eos=True,
        system=("<unk>{{content}}",),
        needs=("reserved_0", "reserved_1"), says=("reserved_0", "reserved_1")),
    "falcon_h1": replace(
        PLAIN_CHATML, observation=CHATML.observation, prefix=(BOS,),
        stop=("<|im_end|>", "<|end_of_text|>"), families=("falcon_h1",)),
    "dbrx": replace(
        PLAIN_CHATML, observation=CHATML.observation, stop_is_eos=True,
        default_system="You are DBRX, created by Databricks. You were last updated in December "
                       "2023. You answer questions based on information available up to that "
                       "point.\n"
                       "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide "
                       "thorough responses to more complex and open-ended questions.\n"
                       "You assist with various tasks, from writing to coding (using markdown for "
                       "code blocks — remember to use ``` with code, JSON, and tables).\n"
                       "(You do not have real-time data access or code execution capabilities. "
                       "You avoid stereotyping and provide balanced perspectives on controversial "
                       "topics. You do not provide song lyrics, poems, or news articles and do "
                       "not divulge details of your training data.)\n"
                       "This is your system prompt, guiding your responses. Do not reference it, "
                       "just respond to the user. If you find yourself talking about this "
                       "message, stop. You should be responding appropriately and usually that "
                       "means not mentioning this.\n"
                       "YOU DO NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE "
                       "INFORMATION IS DIRECTLY PERTINENT TO THE USER'S QUERY.",
        families=("dbrx",), says=("<|im_start|>", "DBRX")),
    "cpm4": replace(
        PLAIN_CHATML, observation=CHATML.observation, prefix=(BOS,), families=("minicpm",)),
    # Formats that any model can be taught:
    "chatml": CHATML,
    "chatml_de": replace(
        CHATML, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "vicuna": Template(
        user=("USER: {{content}} ASSISTANT:",),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
                       "The assistant gives helpful, detailed, and polite answers to the user's "
                       "questions.",
        own_jinja=True, says=("USER: ", "ASSISTANT:")),
    "alpaca": Template(
        user=("### Instruction:\n{{content}}\n\n### Response:\n",),
        assistant=("{{content}}", EOS, "\n\n"),
        default_system="Below is an instruction that describes a task. "
                       "Write a response that appropriately completes the request.\n\n",
        own_jinja=True, says=("### Instruction:", "### Response:")),
    "default": Template(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=("{{content}}", EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
        own_jinja=True, says=("Human: ", "Assistant:")),
    "fewshot": Template(
        user=("{{content}}",), assistant=("{{content}}\n\n",), efficient_eos=True, own_jinja=True),
    "empty": Template(user=("{{content}}",), assistant=("{{content}}",)),
}
# Each row gets its name, and the functions of its tool format.
TEMPLATES = {name: with_tool_functions(replace(row, name=name)) for name, row in TEMPLATES.items()}
