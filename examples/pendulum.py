"""The tutorial's second program: PPO-Clip with a Gaussian policy on Pendulum, the return curve drawn.

    python examples/pendulum.py               our preset: 150,000 steps (750 episodes)
    python examples/pendulum.py --tutorial    the tutorial's hyper-parameters: 400,000 steps (2,000 episodes)

Takes seconds, with the tutorial's settings a minute or two. Ours ends near −165. With the tutorial's settings the last
50 training episodes return −189 (mean of three seeds), where the tutorial's own program reports −236.
"""

from return_curve import options, train_and_draw

from classic.presets import PRESETS

if __name__ == "__main__":
    given = options(__doc__, "tutorial-pendulum", "pendulum.png")
    preset = PRESETS["tutorial-pendulum" if given.tutorial else "Pendulum-v1"]
    train_and_draw(preset, seed=given.seed, output=given.output)
