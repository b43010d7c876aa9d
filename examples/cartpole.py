"""The tutorial's first program: PPO-Clip on CartPole, the return curve and its moving average drawn.

    python examples/cartpole.py               our preset: 50,000 steps of CartPole-v1, whose episodes may last 500 steps
    python examples/cartpole.py --tutorial    the tutorial's hyper-parameters: 100,000 steps, episodes of at most 200

Takes seconds. The curve climbs to the top (500; 200 with the tutorial's time limit) and stays there.
"""

from return_curve import options, train_and_draw

from classic.presets import PRESETS

if __name__ == "__main__":
    given = options(__doc__, "tutorial-cartpole", "cartpole.png")
    preset = PRESETS["tutorial-cartpole" if given.tutorial else "CartPole-v1"]
    train_and_draw(preset, seed=given.seed, output=given.output)
